"""ultralytics: the box prompts of SAM 3, whose encoder pools as that of transformers does, without casts."""

import pytest
import torch
from both import assert_same, gradients_of, loss_of

from roialign.torchvision import install

pytest.importorskip("ultralytics")
from ultralytics.models.sam.modules.blocks import PositionEmbeddingSine
from ultralytics.models.sam.sam3.encoder import TransformerEncoderLayer
from ultralytics.models.sam.sam3.geometry_encoders import Prompt, SequenceGeometryEncoder


def geometry(dtype=torch.float32):
    """A step of the geometry encoder as `build_sam3` makes it: one image of 1008 x 1008, eight boxes."""
    torch.manual_seed(0)
    encoder = SequenceGeometryEncoder(
        pos_enc=PositionEmbeddingSine(num_pos_feats=256, normalize=True, scale=None, temperature=10000),
        boxes_direct_project=True,
        boxes_pool=True,
        boxes_pos_enc=True,
        d_model=256,
        num_layers=3,
        layer=TransformerEncoderLayer(
            d_model=256,
            dim_feedforward=2048,
            dropout=0.1,
            pos_enc_at_attn=False,
            pre_norm=True,
            pos_enc_at_cross_attn_queries=False,
            pos_enc_at_cross_attn_keys=True,
        ),
        use_act_ckpt=True,
        add_cls=True,
        add_post_encode_proj=True,
    )
    encoder = encoder.eval().to(dtype)
    rows = torch.randn(72 * 72, 1, 256).to(dtype).requires_grad_()
    boxes = torch.cat((torch.rand(8, 1, 2) * 0.6 + 0.2, torch.rand(8, 1, 2) * 0.4), 2)

    def step():
        encoder.zero_grad()
        rows.grad = None
        prompt, _ = encoder(Prompt(box_embeddings=boxes), [rows], [(72, 72)])
        loss_of([prompt]).backward()
        return {"prompt": [prompt], "maps": [rows.grad], "gradients": gradients_of(encoder)}

    return step


MEASURED = {"ultralytics `SequenceGeometryEncoder`": geometry}


def test_outputs_and_gradients():
    assert_same(geometry())


def test_bfloat16_is_refused_by_torchvision_and_served_here():
    step = geometry(torch.bfloat16)
    with pytest.raises(RuntimeError, match="not implemented for 'BFloat16'"):
        step()
    with install():
        assert all(t.isfinite().all() for tensors in step().values() for t in tensors)
