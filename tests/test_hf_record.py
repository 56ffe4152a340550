"""Recordings: whose calls they hold, and how they print."""

import re
import threading

import pytest
import torch
from hf_tiny import THIN, hf, logits_of, prompt, sparse_layers, tiny_model
from proxyattn.hf._recording import anything_recorded
from tolerance import assert_same_bits


def test_a_recording_reads_what_the_single_call_reads(device):
    model, ids = tiny_model("Llama", device), prompt(device, 1000)
    hf.register(**{**THIN, "gamma": 0.5})
    with hf.record() as recording:
        recorded = logits_of(model, "proxyattn", ids)
    single = logits_of(model, "proxyattn", ids)
    if device == "cpu":
        assert_same_bits(recorded, single)
    else:  # heads that read every block may do so in another order
        unit = torch.finfo(torch.bfloat16).eps * float(single.abs().max())
        torch.testing.assert_close(recorded, single, atol=4 * unit, rtol=0)
    assert sparse_layers(recording) == [0, 1]
    for call in recording.sparse:
        assert (call.q_len, call.kv_len, call.block_size) == (1000, 1000, 64)
        assert call.counts.shape == (1, 4, 16)
        assert call.blocks_visible == 4 * (16 * 17 // 2)
        assert call.blocks_read == int(call.counts.sum())
        assert call.share == pytest.approx(float(call.share_by_head.mean()))
    assert 0 < recording.share < 1


def test_nested_recordings_each_hold_their_block():
    model, ids = tiny_model("Llama", "cpu"), prompt("cpu")
    with hf.record() as outer:
        with hf.record() as inner:
            logits_of(model, "proxyattn", ids)
        logits_of(model, "proxyattn", ids)
    logits_of(model, "proxyattn", ids)
    assert sparse_layers(outer) == [0, 1, 0, 1]
    assert sparse_layers(inner) == [0, 1]
    with hf.record() as outer, hf.record() as inner:
        logits_of(model, "proxyattn", ids)
    assert outer.sparse == inner.sparse and outer != inner


def test_a_recording_ends_with_an_error_in_its_block():
    model, ids = tiny_model("Llama", "cpu"), prompt("cpu")
    with pytest.raises(KeyError), hf.record() as recording:
        assert anything_recorded()
        raise KeyError
    logits_of(model, "proxyattn", ids)
    assert not recording.sparse and not anything_recorded()


def test_threads_record_their_own_calls():
    model, ids = tiny_model("Llama", "cpu"), prompt("cpu")
    turn = threading.Barrier(2, timeout=60)
    found = {}

    def work(length):
        with hf.record() as recording:
            turn.wait()
            logits_of(model, "proxyattn", ids[:, :length])
            turn.wait()
        found[length] = {call.q_len for call in recording.sparse}

    threads = [threading.Thread(target=work, args=(length,)) for length in (200, 300)]
    with hf.record() as outer:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {200: {200}, 300: {300}}
    assert not outer.sparse


def test_a_recording_prints_as_a_table():
    changes = {
        "use_sliding_window": True,
        "sliding_window": 100,
        "max_window_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    model, ids = tiny_model("Qwen2", "cpu", **changes), prompt("cpu", 1000)
    hf.register(**THIN)
    with hf.record() as recording:
        logits_of(model, "proxyattn", ids)
        logits_of(model, "proxyattn", ids[:, :500])
    lines = repr(recording).splitlines()
    assert str(recording) == repr(recording)
    assert len(lines) == 5 and max(map(len, lines)) < 100
    columns = [re.split(r"\s{2,}", line.strip()) for line in lines]
    assert columns[0] == [
        "layer",
        "sparse calls",
        "blocks read",
        "least head",
        "most head",
        "dense calls",
    ]
    assert columns[2] == ["0", "0", "window x2"]
    assert columns[3][:3] == ["1", "2", f"{100 * recording.share:.1f} %"]
    shares = torch.stack([call.share_by_head for call in recording.sparse])
    assert columns[3][3:] == [f"{100 * shares.min():.1f} %", f"{100 * shares.max():.1f} %"]
    assert columns[4] == ["all", *columns[3][1:], "2 calls"]
    assert repr(recording.sparse[0]).startswith(
        "SparseCall(layer=1, q_len=1000, kv_len=1000, share="
    )


def test_an_empty_recording_says_what_to_look_for():
    with hf.record() as recording:
        pass
    assert "nothing recorded" in repr(recording) and "check_model" in repr(recording)
