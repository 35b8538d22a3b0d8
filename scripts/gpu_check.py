"""What only a GPU can show, in one command: parity, attention kernels, memory, cancelling, a killed worker.

    PYTHONPATH=python python scripts/gpu_check.py --json gpu_check.json

Prints a line for each check and exits with 1 when one fails. `--device cpu` runs the same checks without a GPU, which
shows that the script works and little else. See docs/gpu_check.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from gpu_checks.engine import check_engine
from gpu_checks.families import check_families
from gpu_checks.kernels import check_kernels, check_products
from gpu_checks.parity import check_checkpoint, make_checkpoints
from gpu_checks.quantization import check_quantization
from gpu_checks.ranks import RANKED, check_ranks
from gpu_checks.report import Report, describe_machine


def main() -> int:
    """Run the checks; the exit status."""
    arguments = _parse()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            print("gpu_check: no CUDA device is visible; --device cpu runs the same checks without one")
            return 1
        # Comparisons in fp32 are of fp32: no rounding to TF32 on the way.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    report = Report(describe_machine(device))
    with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
        if "kernels" in arguments.only:
            check_kernels(report, device)
            check_products(report, device)
        if "quantization" in arguments.only:
            check_quantization(report, device)
        if "parity" in arguments.only:
            for name, checkpoint in make_checkpoints(Path(directory)):
                check_checkpoint(report, name, checkpoint, device)
        if "families" in arguments.only:
            check_families(report, device, Path(directory) / "families")
    if arguments.num_gpus > 1:
        check_ranks(report, device, arguments.num_gpus, arguments.families)
    if "engine" in arguments.only:
        check_engine(report, device)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    print(report.summary())
    return 0 if report.ok else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parts = ("kernels", "quantization", "parity", "families", "engine")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--num-gpus", type=int, default=1, help="also run every layout of so many GPUs")
    parser.add_argument("--families", nargs="+", choices=RANKED, default=RANKED, help="of those layouts, only these")
    parser.add_argument("--only", nargs="*", choices=parts, default=parts, help="only these parts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, results and figures here")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
