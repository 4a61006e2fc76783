"""The feature cache: values stay bit-equal, are computed once, and a computation cut off half-way goes on."""

from __future__ import annotations

import pytest
import torch

from mmllm.data.features import FeatureCache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path))
    return FeatureCache(chunk=4)


def maker(calls, dtype=torch.float32, fail_at=None):
    def compute(rows):
        if fail_at is not None and fail_at in rows:
            raise RuntimeError("cut off")
        calls.append(list(rows))
        x = torch.tensor(rows, dtype=torch.float32)[:, None] * torch.tensor([1.0, 0.1])
        return {"pooled": x.to(dtype), "mask": torch.tensor(rows)[:, None] % 2 == 0}

    return compute


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_come_back_bit_equal_and_are_computed_once(cache, dtype):
    calls = []
    got = cache.get_or_compute({"k": 1}, 10, maker(calls, dtype))
    expected = maker([], dtype)(list(range(10)))
    assert got["pooled"].dtype == dtype and torch.equal(got["pooled"], expected["pooled"])
    assert torch.equal(got["mask"], expected["mask"])
    assert [len(c) for c in calls] == [4, 4, 2]
    again = FeatureCache(cache.root).get_or_compute({"k": 1}, 10, maker(calls, dtype))
    assert len(calls) == 3 and torch.equal(again["pooled"], expected["pooled"])


def test_copies_come_first(cache):
    got = cache.get_or_compute("key", 3, maker([]), copies=2)
    assert got["pooled"].shape == (2, 3, 2)
    assert got["pooled"][1, 2, 0] == 5  # copy 1 of item 2 is flat index 1 * 3 + 2


def test_another_key_is_another_entry(cache):
    calls = []
    cache.get_or_compute({"tower": "a"}, 4, maker(calls))
    cache.get_or_compute({"tower": "b"}, 4, maker(calls))
    cache.get_or_compute({"tower": "b"}, 5, maker(calls))
    assert len(calls) == 4


def test_a_cut_off_computation_goes_on_where_it_stopped(cache):
    calls = []
    with pytest.raises(RuntimeError):
        cache.get_or_compute("key", 12, maker(calls, fail_at=9))
    assert calls == [[0, 1, 2, 3], [4, 5, 6, 7]]
    got = cache.get_or_compute("key", 12, maker(calls))
    assert calls[2:] == [[8, 9, 10, 11]]
    assert torch.equal(got["pooled"], maker([])(list(range(12)))["pooled"])


def test_a_chunk_written_but_not_counted_is_written_again(cache):
    """A kill between the data and the count must not shift rows."""
    with pytest.raises(RuntimeError):
        cache.get_or_compute("key", 8, maker([], fail_at=5))
    part = next(cache.root.glob("*.part"))
    with open(part / "pooled.bin", "ab") as f:
        f.write(b"\x07" * 13)
    got = cache.get_or_compute("key", 8, maker([]))
    assert torch.equal(got["pooled"], maker([])(list(range(8)))["pooled"])


def test_writing_to_the_tensors_leaves_the_cache_alone(cache):
    got = cache.get_or_compute("key", 4, maker([]))
    got["pooled"].zero_()
    assert cache.get_or_compute("key", 4, maker([]))["pooled"][3, 0] == 3


def test_finished_entries_pass_the_cache_check(cache):
    from mmllm.data.cache import entries, verify

    cache.get_or_compute("key", 4, maker([]), name="scenes-image")
    entry = next(e for e in entries() if e.kind == "features")
    assert entry.state == "whole" and verify(entry) is None
    (entry.path / "pooled.bin").write_bytes(b"x")
    assert verify(entry) is not None
