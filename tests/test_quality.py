"""The quality bench: its prompts, the selectors it compares, what it says about results."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import quality_prompts
import torch
from quality_report import Cell, Results, Row, cell_table, verdicts
from quality_selectors import FlexPrefill, Proxy, XAttention
from torch.nn import functional

pytest.importorskip("transformers", reason="transformers is not installed")
quality = pytest.importorskip("quality")
quality_reader = pytest.importorskip("quality_reader")

CODE_MODEL = Path(__file__).parents[2] / "shared" / "models" / "code-llama-26m"
SCALE = 0.125


# ---- prompts


class Characters:
    """A tokenizer whose tokens are characters."""

    def __init__(self, bos_token_id=None):
        self.bos_token_id = bos_token_id

    def __call__(self, text, add_special_tokens, return_offsets_mapping=False):
        assert not add_special_tokens
        encoded = {"input_ids": [ord(letter) for letter in text]}
        if return_offsets_mapping:
            encoded["offset_mapping"] = [(place, place + 1) for place in range(len(text))]
        return encoded


def make(style, *, questions=5, seed=0, bos=None, length=6000):
    tokenizer = Characters(bos)
    return quality_prompts.make_prompts(
        tokenizer, quality_prompts.STYLES[style], length, questions, seed
    )


def spell(ids):
    return "".join(chr(token) for token in ids.tolist())


@pytest.mark.parametrize("style", ["code", "prose"])
def test_answers_are_what_the_text_says(style):
    (prompt,) = make(style)
    assert len(prompt.ids) == 6000 and len(prompt.answers) == 5
    text, questions = spell(prompt.ids[: prompt.text_end]), spell(prompt.ids[prompt.text_end :])
    stated = dict(re.findall(r"secret number of ([\w ]+) is (\d+)\.\n", text))
    assert len(stated) == quality_prompts.NUM_STATEMENTS
    asked = re.findall(r"secret number of ([\w ]+?)(?:\?| is)", questions)
    answers = [spell(prompt.ids[span.start : span.stop]) for span in prompt.answers]
    assert [answer.strip() for answer in answers] == [stated[name] for name in asked]


def test_text_between_statements_is_as_it_was():
    """Tokens of the whole text: models are not used to lines read one by one."""
    (prompt,) = make("code")
    text = spell(prompt.ids[: prompt.text_end])
    name, source = re.match(r"\n# file: (\S+)\n(.*)", text, re.DOTALL).groups()
    source = re.sub(r"\n# The secret number of [\w ]+ is \d+\.\n", "", source).split("\n# file: ")[
        0
    ]
    files = [path for path in quality_prompts._source_files() if path.name == name]
    assert any(path.read_text(errors="replace").startswith(source) for path in files)


def test_questions_are_spread_over_prompts():
    prompts = make("code", questions=26)
    assert [len(prompt.answers) for prompt in prompts] == [12, 12, 2]
    assert len({spell(prompt.ids) for prompt in prompts}) == 3


def test_prompts_depend_on_the_seed_alone():
    first, same, other = make("code"), make("code"), make("code", seed=1)
    assert torch.equal(first[0].ids, same[0].ids) and not torch.equal(first[0].ids, other[0].ids)


def test_prompts_start_as_the_model_wants():
    (prompt,) = make("prose", bos=2)
    assert prompt.ids[0] == 2 and len(prompt.ids) == 6000


def test_a_length_without_room_for_text_is_named():
    with pytest.raises(ValueError, match="quality: length must leave more than 16 lines"):
        make("code", length=1500)


# ---- layers with a window


@pytest.mark.parametrize("length", [128, 129, 200, 255])
def test_window_attention_is_masked_attention(length):
    window, random = 64, torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, length, 16, generator=random) for heads in (4, 2, 2))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    expected = functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(2, 1),
        value.repeat_interleave(2, 1),
        (distance >= 0) & (distance < window),
        scale=SCALE,
    )
    out = quality_reader.window_attention(query, key, value, window, SCALE)
    torch.testing.assert_close(out, expected)


# ---- selectors


def random_heads(length, q_heads=2, kv_heads=1, seed=0):
    random = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(1, length, heads, 64, generator=random) * 2 for heads in (q_heads, kv_heads)
    )


def chosen_blocks(lists):
    """Sets of key blocks, by head and query block."""
    assert lists.indices.dtype == lists.counts.dtype == torch.int32
    return [
        [set(row[:count].tolist()) for row, count in zip(rows, counts, strict=True)]
        for rows, counts in zip(lists.indices[0], lists.counts[0].tolist(), strict=True)
    ]


@pytest.mark.parametrize("selector", [XAttention(8), XAttention(16), FlexPrefill(), Proxy()])
@pytest.mark.parametrize("length", [1000, 1024])
def test_lists_hold_sink_and_diagonal_and_nothing_unseen(selector, length):
    q, k = random_heads(length)
    lists = selector.choose(q, k, SCALE)
    heads = [rows for rows in chosen_blocks(lists) for _ in range(2 // lists.indices.shape[1])]
    for rows in heads:
        assert len(rows) == math.ceil(length / lists.block_size)
        for number, blocks in enumerate(rows):
            assert {0, number} <= blocks <= set(range(number + 1))


def antidiagonal_mass(q, k, stride, block):
    """Block mass by its definition, of ``q, k [N, D]`` in float64."""
    cells = len(q) // stride
    logits = np.full((cells, cells), -np.inf)
    for row in range(cells):
        for column in range(row + 1):
            pairs = [
                q[row * stride + stride - 1 - t] @ k[column * stride + t] for t in range(stride)
            ]
            logits[row, column] = SCALE * np.mean(pairs)
    mass = np.exp(logits - logits.max(1, keepdims=True))
    mass /= mass.sum(1, keepdims=True)
    size = block // stride
    return mass.reshape(cells // size, size, cells // size, size).sum((1, 3))


@pytest.mark.parametrize("stride", [8, 16])
def test_xattention_takes_the_fewest_that_hold_the_threshold(stride):
    q, k = random_heads(1024)
    selector = XAttention(stride, threshold=0.6)
    heads = chosen_blocks(selector.choose(q, k, SCALE))
    dropped = 0
    for head, rows in enumerate(heads):
        mass = antidiagonal_mass(
            q[0, :, head].double().numpy(), k[0, :, 0].double().numpy(), stride, 128
        )
        for number, blocks in enumerate(rows):
            free = sorted(blocks - {0, number}, key=lambda block: mass[number, block])
            held, total = mass[number, sorted(blocks)].sum(), mass[number].sum()
            assert held >= 0.6 * total - 1e-5
            left = set(range(number + 1)) - blocks
            if free:
                assert held - mass[number, free[0]] < 0.6 * total + 1e-5
                assert all(mass[number, block] <= mass[number, free[0]] + 1e-5 for block in left)
            dropped += len(left)
    assert dropped > 10


def test_flexprefill_follows_a_column_and_a_diagonal():
    """One head looks at token 300, another 260 tokens back: a block column, block diagonals."""
    length, column, back = 2048, 300, 260
    positions = torch.randn(length, 64, generator=torch.Generator().manual_seed(0))
    positions /= positions.norm(dim=1, keepdim=True)
    q, k = torch.zeros(1, length, 2, 64), torch.zeros(1, length, 2, 64)
    q[0, :, 0, 0] = k[0, column, 0, 0] = 100.0
    k[0, :, 1], q[0, back:, 1] = 100 * positions, 100 * positions[:-back]
    selector = FlexPrefill(gamma=0.9, tau=0.0, min_budget=256)
    by_column, by_diagonal = chosen_blocks(selector.choose(q, k, SCALE))
    for number in range(3, 16):
        assert {0, column // 128, number} <= by_column[number] and len(by_column[number]) <= 4
        assert {0, number - back // 128, number} <= by_diagonal[number]
        assert len(by_diagonal[number]) <= 4


def test_flexprefill_budget_is_in_columns_and_diagonals():
    q, k = random_heads(2048)
    few = FlexPrefill(gamma=0.01, tau=0.0, min_budget=512).choose(q, k, SCALE)
    # Four columns and four diagonals, which cross somewhere.
    assert few.counts[0, :, -1].min() >= 4 and few.counts[0, :, -1].max() <= 8


def test_flexprefill_trusts_pooled_attention_where_it_is_right():
    """Queries and keys that are the same all over a block: the pooled estimate is the truth."""
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 16, 1, 64, generator=random).repeat_interleave(128, 1) * 4 for _ in "qk")
    trusting = FlexPrefill(gamma=0.6, tau=0.1, min_budget=128).choose(q, k, SCALE)
    logits = (q[0, ::128, 0] @ k[0, ::128, 0].T * SCALE).double().numpy()
    pooled = np.exp(np.where(np.tri(16, dtype=bool), logits, -np.inf))
    pooled /= pooled.sum(1, keepdims=True)
    (rows,) = chosen_blocks(trusting)
    pairs = {(row, block) for row, blocks in enumerate(rows) for block in blocks}
    order = np.dstack(np.unravel_index(np.argsort(-pooled, axis=None), pooled.shape))[0].tolist()
    heaviest = np.cumsum([pooled[tuple(pair)] for pair in order]) <= 0.6 * 16
    expected = {tuple(pair) for pair, wanted in zip(order, heaviest, strict=True) if wanted}
    # The first column and the main diagonal come along.
    expected |= {(row, row) for row in range(16)} | {(row, 0) for row in range(16)}
    assert pairs == expected
    never = FlexPrefill(gamma=0.6, tau=0.0, min_budget=128).choose(q, k, SCALE)
    assert chosen_blocks(never) != [rows]


# ---- results


def some_results():
    def row(family, settings, right, loss, read):
        return Row(family, settings, read, [n < right for n in range(100)], loss, 1.0)

    rows = [
        row("dense", {}, 90, 2.0, 1.0),
        row("proxyattn", {}, 88, 2.004, 0.3),
        row("proxyattn", {"gamma": 0.8}, 80, 2.1, 0.25),
        row("XAttention", {"stride": 8, "threshold": 0.9}, 60, 2.2, 0.3),
    ]
    return Results("a machine", [Cell("model", 16_384, rows)], ["model 16384: one more"])


def test_verdicts_name_what_was_missed():
    default, fast, all_default, all_fast = sorted(
        verdicts(some_results()), key=lambda line: (line.startswith("all"), "gamma" in line)
    )
    assert default == (
        "model 16384, proxyattn: answers 88 where dense answers 90, 97.8% (least 93%) met; "
        "read 0.300 (most 0.31) met; loss over dense +0.0040 (most 0.005) met"
    )
    assert "answers 80 where dense answers 90, 88.9% (least 0%) met" in fast
    assert "read 0.250 (most 0.21) MISSED" in fast and "loss" not in fast
    assert all_default.endswith("97.8% (least 97%) met")
    assert all_fast.endswith("88.9% (least 94%) MISSED")


def test_table_compares_with_dense():
    table = cell_table(some_results().cells[0])
    expected = (
        "| XAttention, stride 8, threshold 0.9 | 0.300 | 60 of 100 | 60 of 90 "
        "| 2.2000 | +0.2000 | 1.0 |"
    )
    assert expected in table.splitlines()


def test_results_come_back_from_their_file(tmp_path):
    results, path = some_results(), tmp_path / "results.json"
    results.save(path)
    assert Results.load([path]) == results
    assert len(Results.load([path, path]).cells) == 2


def test_saved_results_are_shown(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    results, picture = tmp_path / "results.json", tmp_path / "quality.png"
    some_results().save(results)
    quality.main(["--results", str(results), "--plot", str(picture)])
    shown = capsys.readouterr().out
    assert "# a machine" in shown and "out of time for\n  model 16384: one more" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_selectors_fit_the_heads():
    for q_heads, kv_heads, proxies in ((4, 1, {1, 2, 4}), (8, 2, {1, 2, 4, 8}), (6, 2, {1, 2, 6})):
        tried = {s.settings.get("num_proxy_heads") for s in quality.selectors(q_heads, kv_heads)}
        assert tried == {None, *proxies}


@pytest.mark.skipif(not CODE_MODEL.is_dir(), reason="the code model is not beside the checkout")
def test_bench_runs(tmp_path, capsys, device):
    path = tmp_path / "results.json"
    common = ["--model", str(CODE_MODEL), "--device", device, "--json", str(path)]
    size = ["--length", "1536", "--questions", "4", "--loss-tokens", "512"]
    quality.main([*common, *size, "--only", "paper", "XAttention", "--time-limit", "0"])
    assert "code-llama-26m 1536: XAttention, stride 16" in capsys.readouterr().out
    (cell,) = json.loads(path.read_text())["cells"]
    assert [row["family"] for row in cell["rows"]] == ["dense"]
    quality.main([*common, *size, "--only", "paper"])
    dense, paper, shared = Results.load([path]).cells[0].rows
    assert sum(dense.right) == 4 and 1 < dense.loss < 3
    # A floor of 2048 tokens reads all of so short a prompt.
    for row in (paper, shared):
        assert (row.read, row.right) == (1.0, dense.right) and abs(row.loss - dense.loss) < 0.01
