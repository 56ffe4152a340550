"""What only a GPU can show of packed sequences: no synchronisation, and replays of a captured graph
with other lengths."""

import proxyattn
import pytest
import torch
from packs import OPS, arguments_of, random_pack
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


def used_part(op, pack, output):
    """Of an output what belongs to sequences: of lists the rows, of out and lse the tokens."""
    if op == "choose_blocks_varlen":
        return output[:, : sum(-(-q_len // 64) for q_len, _ in pack.lengths)]
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
