"""On two processes: DDP gives the gradients of one, and DTensor pools what is sharded where it lies."""

import gc
import os

import pytest
import torch
import torch.distributed as dist
from conftest import needs_torch
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

import roialign
from roialign.levels import staircase
from roialign.testing import pyramid, random_boxes

SIZE = (64, 80)
STRIDES = [4, 8]
SCALES = [1 / s for s in STRIDES]

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="two processes talk over gloo")


def start(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)


def finish() -> None:
    """Together: else one may still be heard by a thread of the other, which then ends the process."""
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def run_on_two(worker, tmp_path) -> None:
    """A failed assertion in either process raises here."""
    multiprocessing.spawn(worker, (str(tmp_path / "rendezvous"),), nprocs=2)


def pool(features, boxes, **options):
    return roialign.multiscale_roi_align(features, boxes, 2, SCALES, 2, canonical_scale=28, **options)


# data parallel


class Detector(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.neck = torch.nn.ModuleList(torch.nn.Conv2d(3, 4, 1) for _ in STRIDES)
        self.head = torch.nn.Linear(16, 2)

    def forward(self, features, boxes):
        features = [convolution(f) for convolution, f in zip(self.neck, features, strict=True)]
        return self.head(pool(features, boxes).flatten(1)).square().sum()


def sample(rank: int, counts: tuple[int, int]) -> tuple:
    features = pyramid(STRIDES, image_size=SIZE, channels=3, seed=rank)
    return features, random_boxes([counts[rank]], image_size=SIZE, seed=rank)


def train(rank: int, rendezvous: str) -> None:
    start(rank, rendezvous)
    for counts in [(5, 7), (5, 0), (0, 3)]:
        parallel = DistributedDataParallel(Detector())
        parallel(*sample(rank, counts)).backward()
        single = Detector()
        (sum(single(*sample(r, counts)) for r in range(2)) / 2).backward()
        for actual, expected in zip(parallel.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad)
            assert expected.grad.any()
    finish()


def test_ddp_gives_the_gradients_of_a_single_process_also_without_boxes_on_one_rank(tmp_path):
    run_on_two(train, tmp_path)


# sharded tensors


def shard(rank: int, rendezvous: str) -> None:
    start(rank, rendezvous)
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.debug import CommDebugMode

    import roialign.sharding

    roialign.sharding.register()
    mesh = init_device_mesh("cpu", (2,))
    maps = pyramid(STRIDES, image_size=SIZE, images=2, channels=6)
    index = torch.arange(8) % 2
    rois = torch.cat((index[:, None], random_boxes([8], image_size=SIZE)[0]), 1)
    levels = torch.arange(8) % 2
    whole = Shard(1), Replicate(), Shard(1), Shard(1)
    boxes_apart = Replicate(), Shard(0), Shard(0), Partial()
    together = Replicate(), Replicate(), Replicate(), Replicate()
    pooling = ((2, 3), SCALES, 2, False, *staircase(SCALES, 28, 4, torch.float32))
    operator = torch.ops.roialign.multiscale_roi_align
    for given in (None, levels):
        leaves = [f.clone().requires_grad_() for f in maps]
        expected = operator(leaves, rois, given, *pooling)
        grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
        expected_grads = torch.autograd.grad(expected, leaves, grad)
        for of_maps, of_rois, of_result, of_grads in (whole, boxes_apart, together):
            features = [distribute_tensor(f, mesh, [of_maps]).requires_grad_() for f in maps]
            apart = [None if t is None else distribute_tensor(t, mesh, [of_rois]) for t in (rois, given)]
            grad_apart = distribute_tensor(grad, mesh, [of_result])
            with CommDebugMode() as communication:
                out = operator(features, *apart, *pooling)
                grads = torch.autograd.grad(out, features, grad_apart)
            assert communication.get_total_counts() == 0
            assert out.placements == (of_result,)
            assert torch.equal(out.full_tensor(), expected.detach())
            for g, e in zip(grads, expected_grads, strict=True):
                assert g.placements == (of_grads,)
                torch.testing.assert_close(g.full_tensor(), e)
    # volumes, and gradients of boxes
    torch.manual_seed(0)  # the same in both processes
    volume = torch.rand(2, 6, 5, 8, 9)
    volume_rois = torch.cat((index[:, None], torch.rand(8, 3) * 3, torch.rand(8, 3) * 5 + 3), 1)
    pooling = ((2, 3, 2), [1.0], 2, False, (), (0,), True)
    leaf = volume_rois.clone().requires_grad_()
    expected = operator([volume], leaf, None, *pooling)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), leaf)
    for of_maps, of_rois, of_result, _ in (whole, boxes_apart, together):
        leaf = distribute_tensor(volume_rois, mesh, [of_rois]).requires_grad_()
        out = operator([distribute_tensor(volume, mesh, [of_maps])], leaf, None, *pooling)
        assert out.placements == (of_result,)
        assert torch.equal(out.full_tensor(), expected.detach())
        (grad,) = torch.autograd.grad(out.square().sum(), leaf)
        torch.testing.assert_close(grad.full_tensor(), expected_grad)
    # the public function, with the boxes of both images on both ranks
    features = [distribute_tensor(f, mesh, [Shard(1)]) for f in maps]
    boxes = random_boxes([4, 3], image_size=SIZE)
    out = pool(features, [distribute_tensor(b, mesh, [Replicate()]) for b in boxes])
    assert out.placements == (Shard(1),)
    assert torch.equal(out.full_tensor(), pool(maps, boxes))
    finish()


@needs_torch("2.9", "DTensor drops the placements of a result that is a list of tensors")
def test_dtensor_pools_channels_and_boxes_where_they_lie(tmp_path):
    run_on_two(shard, tmp_path)


def test_a_torch_without_lists_of_results_in_dtensor_is_named(monkeypatch):
    from torch.distributed.tensor._op_schema import OpSchema

    import roialign.sharding

    monkeypatch.delattr(OpSchema, "return_type_list_tensor_like", raising=False)
    with pytest.raises(RuntimeError, match=r"sharding must have PyTorch 2\.9 or later, got 2\."):
        roialign.sharding.register()
