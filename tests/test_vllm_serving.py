"""proxyattn.vllm in a vLLM engine on a CPU: beside vLLM's own attention where all blocks are read,
beside the transformers hook where few are."""

import pytest
import torch
from vllm_tiny import generate, log_probs_of, require_vllm, save_model, serving, tokens

require_vllm()

import proxyattn.hf  # noqa: E402
import proxyattn.vllm  # noqa: E402
from proxyattn.vllm import _sparse  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

#: Every block is read, by rows that see 256 keys.
EXACT = {"gamma": 1.0, "min_seqlen": 256, "min_queries": 16}
#: Few blocks are read, by rows that see 128 keys.
THIN = {"gamma": 0.3, "min_budget": 0, "min_seqlen": 128, "min_queries": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny"))


def mixed_prompts():
    (shared,) = tokens(2000, seed=1)
    return [*tokens(5, 33, 300, 1000, 2500, seed=2), [*shared, 7, 8, 9], [*shared, 3]]


def twice(llm, prompts):
    """The second time around most of a prompt is in the cache."""
    return generate(llm, prompts) + generate(llm, prompts)


def assert_same(ours, theirs):
    for (our_tokens, our_log_probs), (their_tokens, their_log_probs) in zip(
        ours, theirs, strict=True
    ):
        assert our_tokens == their_tokens
        torch.testing.assert_close(
            torch.tensor(our_log_probs), torch.tensor(their_log_probs), rtol=0, atol=1e-4
        )


@pytest.fixture
def plans(monkeypatch):
    """The plans of all steps."""
    made = []
    make_plan = _sparse.make_plan

    def watched(*args):
        made.append(make_plan(*args))
        return made[-1]

    monkeypatch.setattr(_sparse, "make_plan", watched)
    return made


def new_counts(before):
    after = proxyattn.vllm.counts()
    return {kind: after[kind] - before.get(kind, 0) for kind in after}


@pytest.fixture(scope="module")
def stock(model):
    """What vLLM's own attention makes of the mixed prompts; proxyattn, installed, stays out."""
    before = proxyattn.vllm.counts()
    with serving(model) as llm:
        outputs = twice(llm, mixed_prompts())
    assert proxyattn.vllm.counts() == before
    return outputs


@pytest.mark.parametrize(
    ("backend", "eager"), [("CUSTOM", True), ("PROXYATTN", False)], ids=["eager", "compiled"]
)
def test_all_blocks_are_vllms_attention(model, stock, plans, backend, eager):
    before = proxyattn.vllm.counts()
    with serving(model, backend, EXACT, enforce_eager=eager) as llm:
        assert_same(twice(llm, mixed_prompts()), stock)
    counted = new_counts(before)
    assert counted["sparse"] > 20 and counted["decode"] > 200 and counted["short"] > 4
    made = [plan for plan in plans if plan is not None]
    assert any(plan.dense for plan in made), "no step had long rows and others"
    spans = [span for plan in made for span in plan.sparse]
    assert len(spans) == len(made), "a step had more than one sparse call"
    assert any(span.rows[1] - span.rows[0] > 1 for span in spans)
    assert any(span.max_keys > span.max_queries for span in spans)


def test_requests_may_be_preempted_and_resumed(model):
    prompts = tokens(500, 501, 502, seed=4)
    # Pages for the prompts, but not for all that they are continued with.
    few = {"num_gpu_blocks_override": 17, "max_model_len": 2048, "disable_log_stats": False}
    outputs = []
    for backend, settings in ((None, None), ("CUSTOM", EXACT)):
        with serving(model, backend, settings, **few) as llm:
            outputs.append(generate(llm, prompts, max_tokens=200))
            metrics = {metric.name: metric for metric in llm.get_metrics()}
            assert metrics["vllm:num_preemptions"].value > 0
    assert_same(*outputs[::-1])


def hook_log_probs(model, prompt, chunk):
    """What the transformers hook gives, with the prompt in chunks."""
    proxyattn.hf.register(
        **{name: THIN[name] for name in ("gamma", "min_budget", "min_seqlen")},
    )
    hooked = AutoModelForCausalLM.from_pretrained(
        model, attn_implementation="proxyattn", dtype=torch.float32
    ).eval()
    ids, cache, logits = torch.tensor([prompt]), None, []
    with torch.no_grad(), proxyattn.hf.record() as recording:
        for part in ids.split(chunk, dim=1):
            out = hooked(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
    assert len(recording.sparse) == 2 * len(logits) and not recording.dense
    assert all(call.share < 0.8 for call in recording.sparse)
    scores = torch.cat(logits, dim=1)[0, :-1].log_softmax(-1)
    return scores.gather(1, ids[0, 1:, None])[:, 0]


def test_whole_prompts_are_the_transformers_hook(model):
    (prompt,) = tokens(1500, seed=5)
    with serving(model, "CUSTOM", THIN, max_num_batched_tokens=2048) as llm:
        ours = log_probs_of(llm, prompt)
    torch.testing.assert_close(ours, hook_log_probs(model, prompt, 1500), rtol=0, atol=1e-4)
    with serving(model, max_num_batched_tokens=2048) as llm:
        dense = log_probs_of(llm, prompt)
    assert (ours - dense).abs().max() > 0.01, "all blocks give the same: the test shows nothing"


def test_chunks_are_the_transformers_hook_in_chunks(model):
    (prompt,) = tokens(1900, seed=6)
    with serving(model, "CUSTOM", THIN, block_size=32) as llm:
        ours = log_probs_of(llm, prompt)
    torch.testing.assert_close(ours, hook_log_probs(model, prompt, 512), rtol=0, atol=1e-4)


def gathered(cache, table, length):
    """Keys or values of a sequence, from its pages."""
    page = cache.shape[1]
    pages = table[: -(-length // page)].long()
    return cache[pages].flatten(0, 1)[None, :length]


def test_rows_read_what_choose_blocks_gives_for_their_chunk(model, monkeypatch):
    attend, rows = _sparse.proxy_attention_varlen, []

    def checked(q, k, v, cu_seqlens, _, max_q, max_k, *, block_table, seqused_k, out, **settings):
        arguments = {"block_table": block_table, "seqused_k": seqused_k, "out": out, **settings}
        attend(q, k, v, cu_seqlens, None, max_q, max_k, **arguments)
        starts, lengths = cu_seqlens.tolist(), seqused_k.tolist()
        scale = settings["scale"]
        for row, length in enumerate(lengths):
            queries = q[None, starts[row] : starts[row + 1]]
            keys, values = (gathered(cache, block_table[row], length) for cache in (k, v))
            indices, counts = proxyattn.choose_blocks(queries, keys, **settings)
            wanted, _ = proxyattn.block_sparse_attention(
                queries, keys, values, indices, counts, block_size=64, scale=scale
            )
            assert torch.equal(out[starts[row] : starts[row + 1]], wanted[0])
            rows.append((queries.shape[1], length))

    monkeypatch.setattr(_sparse, "proxy_attention_varlen", checked)
    # The last begins with ten blocks of the first.
    prompts = [*tokens(700, 900, seed=7), tokens(700, seed=7)[0][:640] + tokens(300, seed=8)[0]]
    with serving(model, "CUSTOM", THIN) as llm:
        generate(llm, prompts[:2], max_tokens=2)
        generate(llm, prompts[2:], max_tokens=2)
    assert (512, 512) in rows and (188, 700) in rows
    assert any(length - queries == 640 for queries, length in rows), "nothing was in the cache"


def test_settings_that_do_not_exist_are_refused(model):
    with (
        pytest.raises(ValueError, match=r"settings must be among min_seqlen, .*, got 'gama'"),
        serving(model, "CUSTOM", {"gama": 0.9}),
    ):
        pass
