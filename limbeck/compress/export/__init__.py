"""Export: what a model becomes for others, and the proof that they read it.

Example:
    from pathlib import Path
    from limbeck.compress.export import write_dense

    write_dense(directory := Path("exported"), "tiny-student")
    sorted(file.name for file in directory.iterdir())
"""

from limbeck.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "CertificateConfig": "probes",
        "ExportConfig": "stage",
        "Finding": "lint",
        "Probes": "certificate",
        "lint_directory": "lint:lint",
        "probes_of": "probes",
        "write_certificate": "certificate",
        "write_compressed": "compressed_tensors",
        "write_dense": "dense",
        "write_gguf": "gguf",
    },
)
