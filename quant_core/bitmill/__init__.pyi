"""What `__init__.py` loads at first use, for editors and type checkers."""

from bitmill.allocation.profiled import Allocated as Allocated
from bitmill.allocation.profiled import ProfiledModel as ProfiledModel
from bitmill.config.bit_width_map import BitWidthMap as BitWidthMap
from bitmill.config.methods import GPTQ as GPTQ
from bitmill.config.methods import RTN as RTN
from bitmill.config.methods import OmniQuant as OmniQuant
from bitmill.config.quantization import Allocation as Allocation
from bitmill.config.quantization import Budget as Budget
from bitmill.config.quantization import Calibration as Calibration
from bitmill.config.quantization import Evaluation as Evaluation
from bitmill.config.quantization import QuantizationConfig as QuantizationConfig
from bitmill.config.quantization import Refinement as Refinement
from bitmill.config.slim_llm import read_slim_map as read_slim_map
from bitmill.errors import BitmillError as BitmillError
from bitmill.errors import Cancelled as Cancelled
from bitmill.inference.linear import QuantizedLinear as QuantizedLinear
from bitmill.inference.load import load as load
from bitmill.io.manifest import Manifest as Manifest
from bitmill.io.manifest import check_folder as check_folder
from bitmill.library.evaluate import evaluate as evaluate
from bitmill.library.export import export as export
from bitmill.library.profiles import allocate as allocate
from bitmill.library.profiles import profile as profile
from bitmill.library.push import push as push
from bitmill.library.quantize import quantize as quantize
from bitmill.library.quantize import refine as refine
from bitmill.library.quantize import sweep as sweep
from bitmill.models.tokenizer import load_tokenizer as load_tokenizer
from bitmill.pipeline.progress import Progress as Progress
from bitmill.pipeline.result import Result as Result
from bitmill.pipeline.verify import verify_folder as verify_folder
from bitmill.quant.tensors import PackedTensor as PackedTensor
from bitmill.quant.tensors import QuantizedWeight as QuantizedWeight

__version__: str
__all__: list[str]
