"""What proxyattn.vllm makes of vLLM's classes, with stand-ins for these: rows go where the plan
says, and all that it can't do to vLLM's own code."""

from functools import partial
from importlib import import_module
from types import SimpleNamespace

import proxyattn
import pytest
import torch
import vllm_stub
from proxyattn.vllm import _counts, _notices

HEADS, KV_HEADS, DIM, PAGE = 4, 2, 64, 32
#: Decodes, a short prompt, a long one, a short one between, a chunk of a long one, and padding.
QUERIES, KEYS = (1, 1, 70, 150, 90, 200, 0), (300, 2, 70, 150, 90, 500, 0)
DENSE = {"gamma": 1.0, "min_seqlen": 128, "min_queries": 64}
THIN = {"gamma": 0.3, "min_budget": 0, "min_seqlen": 128, "min_queries": 64}


@pytest.fixture(params=vllm_stub.VERSIONS)
def version(request):
    return request.param


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(_notices, "_said", set())
    monkeypatch.setattr(_counts, "_counts", type(_counts._counts)())
    monkeypatch.setattr(_counts, "_sparse_when_logged", 0)
    monkeypatch.setattr(_counts, "_logged_at", -_counts._LOG_EVERY)


class Step:
    """A layer, and a step of the engine: inputs, pages in no order, and vLLM's metadata."""

    def __init__(self, monkeypatch, version, settings=DENSE, page=PAGE, layers=1, **layer):
        self.layers = {}
        self.config = vllm_stub.make_config(self.layers, **settings)
        self.common_class, _ = vllm_stub.install(monkeypatch, version, config=self.config)
        self.gpu = import_module("proxyattn.vllm._gpu")
        self.impls = [self.impl(**layer) for _ in range(layers)]
        self.builder = self.make_builder(page)
        self.make_inputs(page)

    def impl(self, **changes):
        given = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto", **changes}
        impl = self.gpu.ProxyImpl(HEADS, DIM, DIM**-0.5, KV_HEADS, **given)
        self.layers[f"layer.{len(self.layers)}"] = SimpleNamespace(impl=impl)
        return impl

    def make_builder(self, page=PAGE):
        spec = SimpleNamespace(block_size=page)
        return self.gpu.ProxyBuilder(spec, list(self.layers), self.config, torch.device("cpu"))

    def make_inputs(self, page):
        starts = torch.tensor((0, *QUERIES)).cumsum(0).int()
        total, rows = int(starts[-1]), len(QUERIES)
        pages = [-(-keys // page) for keys in KEYS]
        order = torch.randperm(sum(pages) + 3).int()
        table = torch.full((rows, max(pages)), 10**6, dtype=torch.int32)
        for row, own in enumerate(order[: sum(pages)].split(pages)):
            table[row, : len(own)] = own
        self.cache = torch.randn(len(order), KV_HEADS, page, 2 * DIM)
        self.query = torch.randn(total + 5, HEADS, DIM)  # behind the last, what graphs pad
        self.key = torch.randn(total + 5, KV_HEADS, DIM)
        keys = torch.tensor(KEYS, dtype=torch.int32)
        self.common = self.common_class(
            query_start_loc=starts.clone(),
            query_start_loc_cpu=starts,
            seq_lens=keys.clone(),
            num_reqs=rows,
            num_actual_tokens=total,
            max_query_len=max(QUERIES),
            max_seq_len=max(KEYS),
            block_table_tensor=table,
            slot_mapping=torch.zeros(total, dtype=torch.int64),
            positions=torch.zeros(3, total),
            is_prefilling=torch.tensor([number > 1 for number in QUERIES]),
            seq_lens_cpu_upper_bound=keys,
        )

    def build(self, prefix=0):
        return self.builder.build(common_prefix_len=prefix, common_attn_metadata=self.common)

    def run(self, impl=None, metadata=None, key=None, **scales):
        output = torch.full_like(self.query, torch.nan)
        impl = self.impls[0] if impl is None else impl
        metadata = self.build() if metadata is None else metadata
        arguments = (self.query, key, key, self.cache, metadata, output)
        assert impl.forward(None, *arguments, **scales) is output
        return output[: self.common.num_actual_tokens]

    def expected(self, settings):
        """Row by row: sparse with these settings where a row is long, dense elsewhere."""
        outputs = []
        for row, queries in enumerate(self.query[: sum(QUERIES)].split(QUERIES)):
            pages = self.cache[self.common.block_table_tensor[row].clamp(max=len(self.cache) - 1)]
            tokens = pages.transpose(1, 2).flatten(0, 1)[None, : KEYS[row]]
            long = KEYS[row] >= 128 and QUERIES[row] >= 64
            chosen = settings if long else {"gamma": 1.0}
            if QUERIES[row]:
                keys, values = tokens.split(DIM, dim=-1)
                outputs.append(proxyattn.proxy_attention(queries[None], keys, values, **chosen)[0])
        return torch.cat(outputs)


@pytest.mark.parametrize("page", [16, 32, 256])
@pytest.mark.parametrize("with_keys", [True, False], ids=["keys", "cache_only"])
def test_long_rows_are_sparse_and_others_are_vllms(monkeypatch, version, page, with_keys):
    step = Step(monkeypatch, version, THIN, page)
    output = step.run(key=step.key if with_keys else None)
    chosen = {name: THIN[name] for name in ("gamma", "min_budget")}
    assert torch.equal(output, step.expected(chosen))
    assert not torch.allclose(output, step.expected({"gamma": 1.0}), atol=1e-2)
    assert step.impls[0].calls == [[300, 2, 70], [90]]
    assert proxyattn.vllm.counts() == {"decode": 2, "short": 2, "sparse": 2}


def test_the_sparse_call_has_one_span_of_rows(monkeypatch, version):
    step = Step(monkeypatch, version)
    (part,) = step.build().proxyattn.sparse
    assert part.tokens == slice(72, 512) and part.cu_seqlens_q.tolist() == [0, 150, 240, 440]
    assert part.seqused_k.tolist() == [150, 0, 500]  # the short row between has no keys
    assert (part.max_seqlen_q, part.max_seqlen_k) == (200, 500)
    assert part.block_table.data_ptr() == step.common.block_table_tensor[3].data_ptr()


def test_spans_without_room_for_all_rows_are_several_calls(monkeypatch, version):
    step = Step(monkeypatch, version, THIN)
    whole = step.run()
    step.builder._room = 1499  # the last three rows, of 500 keys at most, come to 1500
    metadata = step.build()
    first, second = metadata.proxyattn.sparse
    assert first.seqused_k.tolist() == [150] and second.seqused_k.tolist() == [500]
    assert torch.equal(step.run(metadata=metadata), whole)


def test_the_metadata_of_all_rows_stays_right(monkeypatch, version):
    """Layers of a group that can't run sparse go by it, and by what it is scheduled with."""
    step = Step(monkeypatch, version, THIN)
    windowed = step.impl(sliding_window=512)
    step.builder = step.make_builder()
    metadata = step.build()
    assert torch.equal(step.run(windowed, metadata), step.expected({"gamma": 1.0}))
    assert windowed.calls == [list(KEYS)]
    step.run(metadata=metadata)
    assert step.impls[0].calls == [[300, 2, 70], [90]]
    assert proxyattn.vllm.counts() == {"decode": 4, "short": 4, "sparse": 2, "sliding window": 2}


def test_decodes_alone_are_vllms(monkeypatch, version):
    step = Step(monkeypatch, version)
    starts = torch.tensor([0, 1, 2, 3, 3], dtype=torch.int32)  # the last is padding
    step.common.num_reqs, step.common.max_query_len = 4, 1
    step.common.query_start_loc_cpu, step.common.seq_lens = starts, step.common.seq_lens[:4]
    step.common.seq_lens_cpu_upper_bound = None  # not looked at
    assert step.build().proxyattn is None
    assert proxyattn.vllm.counts() == {"decode": 3}


REFUSED_LAYERS = {
    "alibi": {"alibi_slopes": [1.0] * HEADS},
    "sliding window": {"sliding_window": 512},
    "soft cap": {"logits_soft_cap": 30.0},
    "sinks": {"sinks": torch.zeros(HEADS)},
    "argument": {"something_new": 1},
    "attention type": {"attn_type": "encoder_only"},
    "cache dtype": {"kv_cache_dtype": "fp8"},
}


@pytest.mark.parametrize("reason", REFUSED_LAYERS)
def test_layers_that_it_cannot_do_are_vllms(monkeypatch, caplog, version, reason):
    step = Step(monkeypatch, version, layers=2, **REFUSED_LAYERS[reason])
    step.run()
    assert step.impls[0].calls == [list(KEYS)]
    assert proxyattn.vllm.counts() == {"decode": 4, "short": 4, reason: 4}
    assert [line.getMessage().endswith(f"({reason})") for line in caplog.records].count(True) == 1


def test_windows_that_no_key_falls_out_of_are_sparse(monkeypatch, version):
    step = Step(monkeypatch, version, {**DENSE, "max_model_len": 4096}, sliding_window=4096)
    assert step.impls[0].dense_reason is None


def change(**fields):
    return lambda step: [setattr(step.common, name, value) for name, value in fields.items()]


REFUSED_STEPS = {
    "lengths": change(seq_lens_cpu_upper_bound=None),
    "not causal": change(causal=torch.ones(7)),
    "bidirectional spans": change(mm_req_doc_ranges={5: [(0, 9)]}),
    "page size": lambda step: setattr(step, "builder", step.make_builder(48)),
    "cascade": lambda step: None,
}


@pytest.mark.parametrize("reason", REFUSED_STEPS)
def test_steps_that_it_cannot_do_are_vllms(monkeypatch, caplog, version, reason):
    step = Step(monkeypatch, version)
    REFUSED_STEPS[reason](step)
    for _ in range(2):
        metadata = step.build(prefix=64 if reason == "cascade" else 0)
        assert metadata.proxyattn is None
    step.run(metadata=metadata)
    assert step.impls[0].calls == [list(KEYS)]
    assert proxyattn.vllm.counts()[reason] > 0 and "sparse" not in proxyattn.vllm.counts()
    assert [line.getMessage().endswith(f"({reason})") for line in caplog.records].count(True) == 1


def test_caches_of_another_shape_or_dtype_are_vllms(monkeypatch, caplog, version):
    step = Step(monkeypatch, version)
    metadata = step.build()
    monkeypatch.setattr(vllm_stub.FlashImpl, "forward", lambda self, *args: args[6])
    right = step.cache
    for cache in (right[..., :-1], right[None], right.bfloat16()):
        step.cache = cache
        step.run(metadata=metadata)
    said = " ".join(line.getMessage() for line in caplog.records)
    assert "(cache layout)" in said and "(cache dtype)" in said


def test_quantised_outputs_are_vllms(monkeypatch, version):
    step = Step(monkeypatch, version)
    assert not step.impls[0].fused_output_quant_supported(None)
    step.run(output_scale=torch.ones(1))
    assert step.impls[0].calls == [list(KEYS)]


def test_graphs_pages_and_order(monkeypatch, version):
    step = Step(monkeypatch, version)
    builder, backend = step.gpu.ProxyBuilder, step.gpu.ProxyBackend
    wanted = vllm_stub.CGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    assert builder.get_cudagraph_support(step.config, None) is wanted
    monkeypatch.setattr(vllm_stub.FlashBuilder, "cudagraph_support", vllm_stub.CGSupport.NEVER)
    assert builder.get_cudagraph_support(step.config, None) is vllm_stub.CGSupport.NEVER
    assert not builder.supports_update_block_table and step.builder.reorder_batch_threshold == 1
    assert (
        backend.get_preferred_block_size(16) == 64 and backend.get_preferred_block_size(128) == 128
    )
    assert backend.get_name() == "CUSTOM" and not backend.supports_batch_invariance()
    assert backend.get_impl_cls() is step.gpu.ProxyImpl and backend.get_builder_cls() is builder


def test_before_there_is_metadata_vllm_fills_the_output(monkeypatch, version):
    """And a call's scratch is held, unless there are too few tokens for a long row."""
    step = Step(monkeypatch, version)
    held = []
    monkeypatch.setattr(
        import_module("proxyattn.vllm._sparse"), "hold_scratch", partial(_note, held)
    )
    for tokens in (63, 64):
        query = step.query[:tokens]
        output = torch.ones_like(query)
        step.impls[0].forward(None, query, None, None, step.cache, None, output)
        assert not output.any()
    assert held == [(KV_HEADS, 1 << 20)]


def _note(held, query, kv_heads, num_keys, settings):
    held.append((kv_heads, num_keys))


def test_settings_and_changed_proxy_heads_are_logged_once(monkeypatch, caplog, version):
    caplog.set_level("INFO", "vllm.proxyattn")
    Step(monkeypatch, version, {**DENSE, "num_proxy_heads": 3}, layers=3)
    said = [line.getMessage() for line in caplog.records]
    assert len(said) == 2 and "num_proxy_heads=3 fits no layer of 4 query and 2 kv heads" in said[0]
    assert "at least 128 keys and 64 new tokens" in said[1] and "num_proxy_heads=4" in said[1]


def test_counts_are_logged_once_a_minute(monkeypatch, caplog):
    caplog.set_level("INFO", "vllm.proxyattn")
    now = [1000.0]
    monkeypatch.setattr(_counts.time, "monotonic", lambda: now[0])
    for moment in (1000, 1059, 1060, 1200):
        now[0] = float(moment)
        _counts.add({"sparse": 1, "decode": 2} if moment < 1200 else {"decode": 1}, 3, {"sinks": 1})
    said = [line.getMessage() for line in caplog.records]
    assert len(said) == 2 and said[1].endswith("so far: decode 24, sparse 9, sinks 3")
    assert proxyattn.vllm.counts(worker=None) == {"sparse": 9, "sinks": 3, "decode": 28}
