"""Traces in and out: read, render to tokens with segments, cut, weigh, batch.

Example:
    from limbeck.models import load_tokenizer
    from limbeck.traces import RenderConfig, SupervisionConfig, TraceConfig, TruncationConfig
    from limbeck.traces import collate, make_example, read_traces, render_trace

    traces, counts = read_traces(TraceConfig(source="builtin:chain", num_traces=4))
    tokenizer = load_tokenizer("tiny-student")
    samples = [render_trace(trace, tokenizer, RenderConfig()) for trace in traces]
    cut, weights = TruncationConfig(lead_fraction=0.5), SupervisionConfig(preset="cot")
    batch = collate([make_example(sample, cut, weights) for sample in samples], "packed", tokenizer.pad_token_id)
    batch.num_tokens, batch.target_rows()
"""

from limbeck.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "Batch": "batch",
        "Cut": "truncate",
        "Example": "batch",
        "Markers": "thought",
        "RenderConfig": "render",
        "Sample": "sample",
        "SelectConfig": "select",
        "SupervisionConfig": "supervise",
        "Trace": "trace",
        "TraceConfig": "sources",
        "TruncationConfig": "truncate",
        "apply_cut": "truncate",
        "collate": "batch",
        "common_length": "horizon",
        "fit_cut": "fit:fit",
        "generate_chain": "synthetic:generate",
        "make_example": "batch",
        "parse_record": "parse",
        "read_problems": "sources",
        "read_traces": "sources",
        "render_prompt": "render",
        "render_trace": "render:render",
        "select_traces": "select",
        "split_thought": "thought",
        "split_traces": "select",
        "stop_ids": "render",
        "token_weights": "supervise",
        "truncate_sample": "truncate:truncate",
        "write_jsonl": "trace",
    },
)
