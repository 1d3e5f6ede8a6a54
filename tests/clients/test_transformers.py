"""transformers: SAM 3 with box prompts. Its geometry encoder pools, unaligned and adaptive, maps that lie
channels last; bfloat16 maps and boxes it casts to float16, since torchvision's operator has no bfloat16."""

import pytest
import torch
from both import assert_same, error, gradients_of, loss_of, recorded

from roialign.torchvision import install

transformers = pytest.importorskip("transformers")
from transformers.models.sam3 import modeling_sam3 as sam3  # noqa: E402 - needs transformers

SIDE, PATCH, HIDDEN = 112, 14, 32
BOXES = [[0.5, 0.5, 0.8, 0.7], [0.3, 0.4, 0.1, 0.2], [0.9, 0.9, 0.4, 0.4]]  # centre and size, of the image


def config():
    """SAM 3, of the smallest size that has all its parts."""
    few = {"hidden_size": HIDDEN, "num_attention_heads": 2, "intermediate_size": 64, "dropout": 0.0}
    return transformers.Sam3Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "hidden_size": HIDDEN,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": SIDE,
                "pretrain_image_size": SIDE,
                "patch_size": PATCH,
                "window_size": 4,
                "global_attn_indexes": [1],
            },
            "fpn_hidden_size": HIDDEN,
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        },
        text_config={
            "vocab_size": 64,
            "hidden_size": HIDDEN,
            "intermediate_size": 64,
            "projection_dim": HIDDEN,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 8,
        },
        geometry_encoder_config={**few, "num_layers": 1},
        detr_encoder_config={**few, "num_layers": 1},
        detr_decoder_config={**few, "num_layers": 1, "num_queries": 8},
        mask_decoder_config={"hidden_size": HIDDEN, "num_attention_heads": 2},
    )


def whole(dtype):
    """A step of the whole model."""
    torch.manual_seed(0)
    model = transformers.Sam3Model(config()).eval().to(dtype)
    pixels = torch.randn(2, 3, SIDE, SIDE).to(dtype)
    boxes = torch.tensor([BOXES, BOXES[::-1]]).to(dtype)
    prompt = {
        "input_ids": torch.tensor([[1, 5, 9, 2]] * 2),
        "attention_mask": torch.ones(2, 4, dtype=torch.long),
        "input_boxes": boxes,
        "input_boxes_labels": torch.tensor([[1, 0, 1], [1, 1, 0]]),
    }

    def step():
        model.zero_grad()
        out = model(pixel_values=pixels, **prompt)
        results = {name: [out[name]] for name in ("pred_logits", "pred_boxes", "pred_masks")}
        loss_of(t for (t,) in results.values()).backward()
        return {**results, "gradients": gradients_of(model)}

    return step


def geometry(dtype):
    """A step of the geometry encoder as it is in SAM 3: one image of 1008 x 1008, eight boxes."""
    torch.manual_seed(0)
    encoder = sam3.Sam3GeometryEncoder(transformers.Sam3Config().geometry_encoder_config).eval().to(dtype)
    maps = torch.randn(1, 256, 72, 72).to(dtype).requires_grad_()
    centres, sizes = torch.rand(1, 8, 2) * 0.6 + 0.2, torch.rand(1, 8, 2) * 0.4
    boxes = torch.cat((centres, sizes), 2).to(dtype)
    mask, labels = torch.ones(1, 8, dtype=torch.bool), torch.ones(1, 8, dtype=torch.long)

    def step():
        out = encoder(boxes, mask, labels, [maps]).last_hidden_state
        return {"prompt": [out], "gradients": [*torch.autograd.grad(loss_of([out]), maps)]}

    return step


MEASURED = {
    "transformers `Sam3GeometryEncoder`, float32": lambda: geometry(torch.float32),
    "transformers `Sam3GeometryEncoder`, bfloat16": lambda: geometry(torch.bfloat16),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("part", [whole, geometry])
def test_outputs_and_gradients(part, dtype):
    assert_same(part(dtype))


def test_pooled_bfloat16_is_nearer_to_the_truth_with_the_casts_and_without():
    (call,) = recorded(geometry(torch.bfloat16))
    maps, boxes, size = call.args
    assert maps.dtype == boxes[0].dtype == torch.float16
    with torch.no_grad():
        truth = call.pool(maps.double(), [b.double() for b in boxes], size)
        theirs = call.forward().bfloat16()
        with install():
            cast = call.forward().bfloat16()
            uncast = call.pool(maps.bfloat16(), [b.bfloat16() for b in boxes], size)
    assert uncast.dtype == torch.bfloat16
    worst = [float((t - truth).abs().max()) for t in (theirs, cast, uncast)]
    mean = [float((t - truth).square().mean()) for t in (theirs, cast, uncast)]
    assert worst[1] <= worst[0]
    assert worst[2] <= worst[0]
    assert mean[2] <= mean[1] <= mean[0]


def test_bfloat16_against_the_model_in_float32():
    step, truth = whole(torch.bfloat16), whole(torch.float32)
    # Both are of one seed. What the other layers round decides, so no more than the budget can be asked.
    budget = 2 * error(step(), truth())
    with install():
        assert error(step(), truth()) <= budget
