"""k-means: known clusters, its fixed point, and its corner cases."""

from __future__ import annotations

import pytest
import torch

from mmllm.blocks.kmeans import cluster_means, kmeans


def blobs(k=4, each=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    centres = 10 * torch.eye(k, 6)
    x = centres[:, None] + 0.1 * torch.randn(k, each, 6, generator=g)
    return x.flatten(0, 1), torch.arange(k).repeat_interleave(each)


@pytest.mark.parametrize("seed", range(3))
def test_finds_separate_clusters(seed):
    x, truth = blobs()
    centroids, cluster = kmeans(x, 4, seed)
    assert all(len(set(cluster[truth == c].tolist())) == 1 for c in range(4)) and len(set(cluster.tolist())) == 4
    torch.testing.assert_close(centroids[cluster], cluster_means(x, truth, 4)[truth])


def test_ends_in_a_fixed_point_and_repeats():
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(1))
    centroids, cluster = kmeans(x, 5, seed=2, iterations=100)
    torch.testing.assert_close(centroids, cluster_means(x, cluster, 5))
    assert torch.equal(torch.cdist(x, centroids).argmin(1), cluster)
    again = kmeans(x, 5, seed=2, iterations=100, chunk=7)
    assert torch.equal(again[1], cluster)
    assert not torch.equal(kmeans(x, 5, seed=3, iterations=100)[1], cluster)


def test_as_many_clusters_as_rows_and_one():
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    centroids, cluster = kmeans(x, 6)
    assert sorted(cluster.tolist()) == list(range(6))
    torch.testing.assert_close(centroids[cluster], x)
    centroids, cluster = kmeans(x, 1)
    assert cluster.tolist() == [0] * 6
    torch.testing.assert_close(centroids[0], x.mean(0))


def test_equal_rows_and_bad_numbers():
    _, cluster = kmeans(torch.ones(5, 2), 3)
    assert set(cluster.tolist()) == {0, 1, 2}  # no cluster stays empty
    for k in (0, 6):
        with pytest.raises(ValueError, match="clusters of 5 rows"):
            kmeans(torch.ones(5, 2), k)


def test_rows_without_cluster_count_nowhere():
    x = torch.tensor([[1.0], [3.0], [100.0]])
    assert cluster_means(x, torch.tensor([1, 1, -1]), 3).tolist() == [[0.0], [2.0], [0.0]]
