"""The verbs of the command line, each a function of its file's name; files with an underscore are what verbs share.

Names that their options take are here, so that `--help` shows them without importing torch.
"""

from typing import Literal

QuantizationMethod = Literal["default", "paper"]
Finetuning = Literal["blocks+lsq", "lsq", "blocks", "kd", "none"]
Target = Literal["onnxruntime", "tensorrt", "openvino"]
Repair = Literal["distill", "refit", "none"]
