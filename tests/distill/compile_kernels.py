"""`python compile_kernels.py CAPABILITY`: compiles every kernel for an accelerator, and prints what ptxas says."""

import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from limbeck.distill import kernels

VOCABULARY = 151936
TYPES = {
    **dict.fromkeys(("s_ptr", "t_ptr", "z_ptr"), "*bf16"),
    "labels_ptr": "*i64",
    **dict.fromkeys(("stats_ptr", "ce_ptr", "kd_ptr", "out_ptr", "first_ptr", "second_ptr", "a_ptr", "b_ptr"), "*fp32"),
    **dict.fromkeys(("stride_s", "stride_t", "stride"), "i32"),
    **dict.fromkeys(("inv_t", "p", "log_share", "log_other"), "fp32"),
}
SIZES = {"V": VOCABULARY, "W": VOCABULARY, "HAS_CE": True, "BLOCK": kernels.BLOCK}


def main(capability: int) -> None:
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    # Newer than the one that is kept for older drivers, and it assembles for all.
    special = folder / "ptxas-blackwell"
    ptxas = special if special.exists() else folder / "ptxas"
    for kernel, kinds in (
        (kernels.row_stats, (0, 2, 3)),
        (kernels.row_sums, (3, 5, 6)),
        (kernels.to_gradient, (0, 2, 3, 6)),
        (kernels.log_sums, (None,)),
        (kernels.to_two_terms, (None,)),
    ):
        for kind in kinds:
            names = kernel.arg_names
            constants = {name: value for name, value in {**SIZES, "KIND": kind}.items() if name in names}
            signature = {name: "constexpr" if name in constants else TYPES[name] for name in names}
            aligned = [n for n in names if n.startswith("stride") or n in ("s_ptr", "t_ptr", "z_ptr")]
            source = ASTSource(
                fn=kernel,
                signature=signature,
                constexprs=constants,
                attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
            )
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
            print(kernel.__name__, kind, _assembled(ptxas, made.asm["ptx"]))


def _assembled(ptxas: Path, text: str) -> str:
    target = next(line.split()[1] for line in text.splitlines() if line.startswith(".target")).rstrip(",")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(text)
        command = [str(ptxas), "-v", f"-arch={target}", str(file), "-o", str(file.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + done.stdout
        found = done.stderr
    return " ".join(line.strip() for line in found.splitlines() if "spill" in line or "registers" in line)


if __name__ == "__main__":
    main(int(sys.argv[1]))
