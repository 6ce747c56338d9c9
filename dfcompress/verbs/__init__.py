"""The verbs of the command line, each a function with the name of its file; files with an underscore hold shared parts.

The values of some options are here, so that `--help` shows them without importing torch.
"""

from typing import Literal

QuantizationMethod = Literal["default", "paper"]
Finetuning = Literal["blocks+lsq", "lsq", "blocks", "kd", "none"]
Target = Literal["onnxruntime", "tensorrt", "openvino"]
Repair = Literal["distill", "refit", "none"]
