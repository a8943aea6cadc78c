"""Models: load them by directory, alias or hub id, and ask what they are.

Example:
    from limbeck.models import load_model, load_tokenizer, sizes_of

    model, tokenizer = load_model("tiny-student"), load_tokenizer("tiny-student")
    sizes_of(model), len(tokenizer)
"""

from limbeck.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "Head": "parts",
        "ScratchConfig": "tiny",
        "Sizes": "anatomy",
        "ask_model": "probe:ask",
        "backbone_of": "anatomy",
        "head_of": "probe",
        "hidden_states": "anatomy",
        "load_model": "load",
        "load_scratch": "load",
        "load_tokenizer": "load",
        "model_hash": "load",
        "scratch_model": "tiny",
        "sizes_of": "anatomy",
        "symbol_tokenizer": "tiny",
    },
)
