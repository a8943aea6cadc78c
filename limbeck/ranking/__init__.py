"""Candidates scored by one token: data, training, measures; `limbeck.train_ranker(...)` trains a scorer.

Example:
    from limbeck.ranking import SyntheticConfig, auc_interval, generate_requests, ndcg

    requests = generate_requests(SyntheticConfig(requests=50))
    scores, labels, request = [0.9, 0.2, 0.6, 0.4], [1, 0, 0, 1], [0, 0, 1, 1]
    auc_interval(scores, labels, request), ndcg(scores, labels, request, k=2)
"""

from limbeck.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "FeaturizeConfig": "featurize",
        "GroupingConfig": "request",
        "Interaction": "request",
        "Labels": "featurize",
        "RankEvaluateConfig": "evaluate",
        "RankRecoverConfig": "recover",
        "RankTrainConfig": "train",
        "RankingDataConfig": "data",
        "RankingLossConfig": "objective",
        "Request": "request",
        "SplitConfig": "request",
        "SyntheticConfig": "synthetic",
        "auc_difference": "metrics",
        "auc_interval": "metrics",
        "calibration_error": "metrics",
        "delong_test": "auc",
        "encode_requests": "featurize",
        "expected_auc": "auc",
        "generate_requests": "synthetic",
        "group_log": "request",
        "kendall_tau": "metrics",
        "listwise_divergence": "loss",
        "log_loss": "metrics",
        "ndcg": "metrics",
        "read_requests": "data",
        "request_auc": "metrics",
        "roc_auc": "auc:auc",
        "split_by_time": "request",
        "top_k_churn": "metrics",
    },
)
