"""Each family of torchvision's models: classification, segmentation, detection losses, video, optical flow."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models, ops

from zoo.case import Case, case

ops.boxes._assert_has_ops = lambda: None  # `nms` is there, if only in Python: `torchvision_for_cpus`
ROI_ALIGN = importlib.import_module("torchvision.ops.roi_align")
ROI_ALIGN._roi_align = inspect.unwrap(ROI_ALIGN._roi_align)  # not compiled, it can be differentiated twice

CLASSES = 4
IMAGES = {
    "alexnet": 64, "densenet121": 32, "efficientnet_b0": 32,
    "googlenet": 64, "inception_v3": 128, "mnasnet0_5": 32, "mobilenet_v2": 32,
    "mobilenet_v3_small": 32, "regnet_y_400mf": 64, "resnet18": 32, "resnext50_32x4d": 32, "shufflenet_v2_x0_5": 32,
    "squeezenet1_0": 64, "vgg11_bn": 32,
}  # fmt: skip
# Built from the classes of their families, with few and narrow layers.
SMALL: dict[str, Callable[[], nn.Module]] = {
    "convnext": lambda: models.ConvNeXt(
        [models.convnext.CNBlockConfig(*sizes) for sizes in ((16, 32, 1), (32, None, 1))], num_classes=CLASSES
    ),
    "maxvit": lambda: models.MaxVit((64, 64), 8, 2, [16, 32], [1, 1], 8, 0.1, num_classes=CLASSES),
    "swin": lambda: models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=CLASSES),
    "swin_v2": lambda: models.SwinTransformer(
        [4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=CLASSES,
        block=models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=models.swin_transformer.PatchMergingV2,
    ),
    "vit": lambda: models.VisionTransformer(64, 16, 2, 4, 32, 48, num_classes=CLASSES),
}  # fmt: skip
SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large")
DETECTION = (
    "fasterrcnn_mobilenet_v3_large_320_fpn", "fcos_resnet50_fpn",
    "retinanet_resnet50_fpn", "ssd300_vgg16", "ssdlite320_mobilenet_v3_large", "maskrcnn_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
)  # fmt: skip
VIDEO = ("r3d_18", "r2plus1d_18", "s3d", "mvit_v1_b", "mvit_v2_s", "swin3d_t")


def names() -> list[str]:
    return [*IMAGES, *SMALL, *SEGMENTATION, *DETECTION, *VIDEO, "raft_small"]


def build(name: str) -> Case:
    if name in IMAGES:
        return _classification(name, IMAGES[name])
    if name in SMALL:
        return _on(SMALL[name](), torch.randn(3, 3, 64, 64))
    if name in SEGMENTATION:
        model = models.get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES)
        return _on(model, torch.randn(2, 3, 64, 64))
    if name in DETECTION:
        return _detection(name)
    if name in VIDEO:
        return _video(name)
    model = models.optical_flow.raft_small(weights=None)
    pair = torch.rand(2, 1, 3, 128, 128) * 2 - 1
    return case(model.double(), lambda: model(*pair, num_flow_updates=2))


def _on(model: nn.Module, x: Tensor) -> Case:
    return case(model.double(), lambda: model(x))


def _classification(name: str, size: int) -> Case:
    options = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False, "aux_logits": False}}
    model = models.get_model(name, weights=None, num_classes=CLASSES, **options.get(name, {}))
    if name in ("alexnet", "vgg11_bn"):  # their classifiers alone have a hundred million weights
        inside = model.avgpool.output_size[0] ** 2 * (256 if name == "alexnet" else 512)
        model.classifier = nn.Sequential(
            nn.Dropout(0.5), nn.Linear(inside, 16), nn.ReLU(inplace=True), nn.Linear(16, CLASSES)
        )
    return _on(model, torch.randn(3, 3, size, size))


def _detection(name: str) -> Case:
    small: dict[str, Any] = {} if name.startswith("ssd") else {"min_size": 64, "max_size": 64}
    if "rcnn" in name:
        small |= {"rpn_pre_nms_top_n_train": 20, "rpn_post_nms_top_n_train": 10, "box_batch_size_per_image": 8}
    model = models.get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES, **small).double()
    images = [torch.rand(3, 64, 64) for _ in range(1 if name == "ssd300_vgg16" else 2)]
    boxes = torch.tensor([[4.0, 6, 40, 44], [20, 10, 60, 50]])
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[0, 6:44, 4:40] = masks[1, 10:50, 20:60] = 1
    corners = torch.stack([boxes[:, :2] + 2, boxes[:, 2:] - 2], 1)
    # by name, since torchvision wants these in float32, which means float64 here
    keypoints = torch.cat([corners.repeat(1, 9, 1)[:, :17], torch.ones(2, 17, 1)], 2).type("torch.FloatTensor")
    target = {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks, "keypoints": keypoints}
    if name.startswith("keypoint"):
        target["labels"] = torch.tensor([1, 1])

    def loss() -> Tensor:
        losses: dict[str, Tensor] = model(images, [target] * len(images))
        return torch.stack([*losses.values()]).sum()

    return case(model, loss)


def _video(name: str) -> Case:
    if name.startswith("mvit"):
        return _on(_small_mvit(name == "mvit_v2_s"), torch.randn(2, 3, 4, 32, 32))
    model = models.get_model(name, weights=None, num_classes=CLASSES)
    if name == "s3d":
        model.avgpool = nn.AvgPool3d(2)  # in place of windows of 7 pixels
    frames = {"s3d": 16}.get(name, 4)
    size = 64 if name == "s3d" else 32
    return _on(model, torch.randn(2, 3, frames, size, size))


def _small_mvit(relative: bool) -> nn.Module:
    block: Callable[..., object] = models.video.mvit.MSBlockConfig
    blocks = [
        block(1, 16, 16, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
        block(2, 16, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
    ]
    return models.video.MViT(
        (32, 32), 4, blocks, residual_pool=relative, residual_with_cls_embed=not relative, rel_pos_embed=relative,
        proj_after_attn=relative, num_classes=CLASSES,
    )  # fmt: skip
