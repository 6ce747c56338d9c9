"""The blocks of a network that mix positions, and what they give of each patch."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

from dfcompress.errors import BadInput
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import load
from dfcompress.models.classifier import Classifier
from dfcompress.models.patches import PatchBlock, knows_patches_alone, patch_blocks, require_patches
from dfcompress.models.recorder import FusedRecorder, HookRecorder

SMALL = {"num_classes": 4, "img_size": 64}


def classifier(network, size=(3, 64, 64)):
    return Classifier(network, ModelCard("small", 4, size, (0.5,) * 3, (0.5,) * 3)).frozen()


def vit(**changes):
    settings = SMALL | {"patch_size": 16, "depth": 2, "embed_dim": 24, "num_heads": 2} | changes
    return classifier(timm.create_model("vit_tiny_patch16_224", **settings), (3, 64, 64))


def swin():
    return timm.create_model(
        "swin_tiny_patch4_window7_224", window_size=4, depths=(1, 1), embed_dim=8, num_heads=(1, 2), **SMALL
    )


def convnext():
    return timm.create_model("convnext_atto", depths=(1,) * 4, dims=(8,) * 4, num_classes=4)


def convnext_of_torchvision():
    setting = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([setting(8, 16, 1), setting(16, None, 1)], num_classes=4)


@pytest.mark.parametrize(
    ("network", "blocks"),
    [
        (lambda: vit().network, [("blocks.0.attn", 4, 4, -1, 1), ("blocks.1.attn", 4, 4, -1, 1)]),
        (lambda: vit(reg_tokens=2).network, [("blocks.0.attn", 4, 4, -1, 3), ("blocks.1.attn", 4, 4, -1, 3)]),
        (swin, [("layers.0.blocks.0", 16, 16, -1, 0), ("layers.1.blocks.0", 8, 8, -1, 0)]),
        (convnext, [(f"stages.{stage}.blocks.0", side, side, 1, 0) for stage, side in enumerate((16, 8, 4, 2))]),
        (convnext_of_torchvision, [("features.1.0.block", 16, 16, 1, 0), ("features.3.0.block", 8, 8, 1, 0)]),
        (
            lambda: torchvision.models.VisionTransformer(64, 16, 1, 2, 8, 16, num_classes=4),
            [("encoder.layers.encoder_layer_0", 4, 4, -1, 1)],
        ),
        (
            lambda: torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [1, 2], [4, 4], num_classes=4),
            [("features.1.0.attn", 16, 16, -1, 0), ("features.3.0.attn", 8, 8, -1, 0)],
        ),
    ],
    ids=["vit", "registers", "swin", "convnext", "torchvision-convnext", "torchvision-vit", "torchvision-swin"],
)
def test_the_innermost_blocks_that_mix_positions_are_found(network, blocks):
    assert patch_blocks(classifier(network())) == [PatchBlock(*block) for block in blocks]


def test_images_that_are_no_squares_have_patches_in_their_proportions():
    made = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=(32, 96), depth=1, embed_dim=24)
    (block,) = patch_blocks(classifier(made, (3, 32, 96)))
    assert (block.height, block.width, block.prefix) == (2, 6, 1)


def test_an_mlp_in_its_place_mixes_nothing():
    """Of the two halves of a ViT's block the attention counts, and a network of perceptrons has none."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.block = nn.Conv2d(3, 8, 16, 16), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
            self.head = nn.Linear(8, 4)

        def forward(self, images):
            return self.head(self.block(self.patches(images).flatten(2).transpose(1, 2)).mean(1))

    assert patch_blocks(classifier(Mixer())) == []


def test_batchnorm_is_preferred_where_there_is_one(resnet20_file):
    assert patch_blocks(load(resnet20_file))
    assert not knows_patches_alone(load(resnet20_file))
    assert knows_patches_alone(vit())


def test_a_network_without_patches_is_refused(lenet):
    assert not knows_patches_alone(lenet)
    with pytest.raises(BadInput, match="no blocks that mix patches"):
        require_patches(lenet)


def test_features_are_those_of_the_map_behind_the_class_token():
    tokens = torch.arange(2 * 7 * 3.0).view(2, 7, 3)
    features = PatchBlock("block", 2, 3, -1, prefix=1).features(tokens)
    assert torch.equal(features, tokens[:, 1:])


def test_large_maps_are_averaged_to_14_patches_a_side():
    maps = torch.randn(2, 5, 56, 56)
    features = PatchBlock("block", 56, 56, 1).features(maps)
    assert features.shape == (2, 196, 5)
    assert torch.allclose(features[1, 15], maps[1, :, 4:8, 4:8].mean((1, 2)), atol=1e-6)
    assert torch.equal(PatchBlock("block", 56, 56, -1).features(maps.movedim(1, -1)), features)


def test_both_recorders_record_the_patches_of_a_network_without_batchnorm():
    made, images = vit(), torch.randn(3, 3, 64, 64)
    blocks = patch_blocks(made)
    by_hooks = HookRecorder(made.network, patches=blocks)(images)
    fused = FusedRecorder(made.network, patches=blocks)(images)
    assert list(by_hooks.patches) == ["blocks.0.attn", "blocks.1.attn"]
    assert by_hooks.layers == fused.layers == ()
    tokens = made.network.patch_embed(images)
    first = made.network.blocks[0]
    taken = first.norm1(made.network._pos_embed(tokens))
    assert torch.allclose(by_hooks.patches["blocks.0.attn"], first.attn(taken)[:, 1:], atol=1e-5)
    for name, features in by_hooks.patches.items():
        assert features.shape == (3, 16, 24)
        assert torch.allclose(fused.patches[name], features, atol=1e-5)
