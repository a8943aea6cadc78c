"""Tasks, answer checking and metrics with intervals; `limbeck.evaluate(...)` scores a model.

Example:
    from limbeck.evaluate import accuracy, check_exact, extract_answer, paired_retention

    check_exact(extract_answer("So the answer is 42."), "42")
    accuracy([True, False, True, True]), paired_retention([1, 0, 1, 1], [1, 1, 1, 1])
"""

from limbeck.lazy import lazy, make_callable

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "AnswerChecker": "workers",
        "EvaluateConfig": "run",
        "EvaluateStageConfig": "stage",
        "Interval": "metrics",
        "Overlap": "verify",
        "PerplexityConfig": "perplexity",
        "Problem": "tasks",
        "Task": "tasks",
        "Verdict": "answers",
        "VerifyConfig": "verify",
        "accuracy": "metrics",
        "avg_at_n": "metrics",
        "check_exact": "compare",
        "check_math": "math_answers",
        "evaluate_model": "run:evaluate",
        "extract_answer": "answers",
        "mean_interval": "metrics",
        "paired_difference": "metrics",
        "paired_retention": "metrics",
        "pass_at_k": "metrics",
        "pass_rates": "verify",
        "ratio_interval": "metrics",
        "share_interval": "metrics",
        "stop_rate": "metrics",
        "task_from_traces": "tasks",
    },
)
make_callable(__name__)
