"""For torch.hub: `torch.hub.load(REPOSITORY, "resnet18")`, without installing tinylab."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "src"))
dependencies = ["torch", "huggingface_hub", "safetensors"]


def resnet18(pretrained: bool = True, classes: int = 200, width: int = 64):
    """Return a ResNet-18 for 64 x 64 pixels; pretrained: with the weights in weights/."""
    from safetensors.torch import load_model

    from tinylab.model import ResNet18

    model = ResNet18(classes, width)
    if pretrained:
        load_model(model, next(ROOT.glob("weights/*/model.safetensors")))
    return model.eval()
