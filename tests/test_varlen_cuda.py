"""What only a GPU can show of packed sequences: no synchronisation, replays of a captured graph
with other lengths, and what each head needs of keys that several thread blocks share out."""

import proxyattn
import pytest
import torch
from packs import OPS, PAGES, arguments_of, random_pack
from tolerance import assert_same_bits

pages = pytest.mark.parametrize("page", [None, 16, 64, 256], ids=str)


@pages
@pytest.mark.parametrize("op", OPS)
def test_never_synchronises(cuda, op, page):
    pack = random_pack(cuda, [(130, 130), (0, 70), (70, 300)], page=page)
    arguments = arguments_of(op, pack)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        getattr(proxyattn, op)(**arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def settings_of(op):
    if op == "block_sparse_attention_varlen":
        return {"return_lse": True}
    settings = {"gamma": 0.5, "min_budget": 0}
    return settings if op == "choose_blocks_varlen" else {**settings, "return_lse": True}


def used_rows(pack, lists, block_size=64):
    """Of lists the rows that belong to sequences."""
    return lists[:, : pack.rows(len(pack.lengths) - 1, block_size).stop]


def used_part(op, pack, output):
    """Of an output what belongs to sequences: of lists the rows, of out and lse the tokens."""
    if op == "choose_blocks_varlen":
        return used_rows(pack, output)
    tokens = slice(0, pack.rest().start)
    return output[tokens] if output.dim() == 3 else output[:, tokens]


def overwrite(arguments, pack):
    """Puts a pack that fits into what a graph was captured with."""
    for name, new in pack.arguments.items():
        if isinstance(new, torch.Tensor) and name in arguments:
            arguments[name][tuple(slice(0, n) for n in new.shape)] = new


@pages
@pytest.mark.parametrize("op", OPS)
def test_replays_with_other_lengths(cuda, op, page):
    """Captured at its capacities; lengths, tables and tokens change between replays."""
    capacity = [(400, 700), (300, 300), (200, 600), (500, 500)]
    captured = random_pack(cuda, capacity, page=page, slack=1, spare=0)
    arguments = arguments_of(op, captured)
    if "indices" in arguments:  # lists that are right for any lengths: what is too far is empty
        blocks = torch.arange(arguments["indices"].shape[2], dtype=torch.int32, device=cuda)
        arguments["indices"] = blocks.expand(arguments["indices"].shape).contiguous()
        arguments["counts"] = torch.randint_like(arguments["counts"], 0, len(blocks) + 1)

    def call():
        return list(getattr(proxyattn, op)(**arguments, **settings_of(op)))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    for seed, lengths in enumerate(
        (
            [(400, 700), (0, 0), (1, 600), (64, 64)],
            [(0, 5), (300, 200), (0, 0), (17, 500)],
            [(400, 400), (300, 301), (200, 300), (500, 500)],
            capacity,
        )
    ):
        pack = random_pack(cuda, lengths, page=page, slack=1, spare=0, seed=seed)
        overwrite(arguments, pack)
        want = call()
        for output in outputs:
            output.zero_()
        graph.replay()
        for first, second in zip(outputs, want, strict=True):
            first, second = (used_part(op, pack, x).contiguous() for x in (first, second))
            assert_same_bits(first, second)


#: Keys of many chunks and of less than one, queries of a whole block and of less, and starts that
#: are no multiple of anything.
LONG = [(70, 5000), (0, 300), (1, 1), (300, 2055), (64, 1024), (17, 9001), (129, 129)]


def estimate_cases():
    """(heads, head_dim, block_size, page, causal), every value of each axis in a few of them."""
    heads = ((8, 2), (4, 4), (7, 1))
    places = (None, *PAGES)
    return [
        (heads[(i + i // 6) % 3], head_dim, block_size, places[(i + i // 6) % 6], i % 4 != 3)
        for i, (head_dim, block_size) in enumerate(
            (d, b) for _ in range(3) for b in (64, 128) for d in (64, 128, 256)
        )
    ]


def case_name(case):
    (q_heads, kv_heads), head_dim, block_size, page, causal = case
    where = "packed" if page is None else f"pages{page}"
    mask = "causal" if causal else "full"
    return f"h{q_heads}x{kv_heads}-d{head_dim}-k{block_size}-{where}-{mask}"


estimates = pytest.mark.parametrize("case", estimate_cases(), ids=case_name)


def needs_alone(estimate, pack, *settings):
    """[S, Hq]: of each sequence in a call of its own. One without queries needs nothing."""
    q_heads = pack.tensors["q"].shape[1]
    nothing = torch.zeros(1, q_heads, device=pack.tensors["q"].device)
    return torch.cat(
        [estimate(q, k, *settings) if q.shape[1] else nothing for q, k, _ in pack.sequences]
    )


@estimates
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_shares_have_the_bits_of_the_sequences_one_by_one(cuda, case, dtype):
    """Lists are those that shares of dense calls, handed in, would give."""
    heads, head_dim, block_size, page, causal = case
    pack = random_pack(cuda, LONG, heads, head_dim, dtype, page, seed=head_dim + block_size)
    shares = needs_alone(proxyattn.estimate_shares, pack, block_size, causal)
    for gamma in (0.2, 0.4, 0.6, 0.8, 0.9, 0.95):
        settings = {"gamma": gamma, "min_budget": 0, "block_size": block_size, "causal": causal}
        got = proxyattn.choose_blocks_varlen(**pack.estimate_arguments, **settings)
        want = proxyattn.choose_blocks_varlen(**pack.estimate_arguments, **settings, shares=shares)
        for pair in zip(got, want, strict=True):
            first, second = (used_rows(pack, lists, block_size) for lists in pair)
            assert torch.equal(first, second), f"gamma {gamma}"


@estimates
@pytest.mark.parametrize("gamma", [0.3, 0.6, 0.9])
def test_budgets_are_those_of_the_sequences_one_by_one(cuda, case, gamma):
    """A last query block sees every key block, so that its counts are the budgets."""
    heads, head_dim, block_size, page, causal = case
    pack = random_pack(cuda, LONG, heads, head_dim, page=page, seed=head_dim + block_size)
    budgets = needs_alone(proxyattn.estimate_budgets, pack, gamma, block_size, causal)
    settings = {"budget_mode": "last_block", "num_sink_blocks": 0, "num_local_blocks": 0}
    settings |= {"gamma": gamma, "min_budget": 0, "block_size": block_size, "causal": causal}
    _, counts = proxyattn.choose_blocks_varlen(**pack.estimate_arguments, **settings)
    for i, (q_len, _) in enumerate(LONG):
        if q_len == 0:
            continue
        assert torch.equal(counts[:, pack.rows(i, block_size)][:, -1], budgets[i].int())
