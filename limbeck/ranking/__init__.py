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
        "Bm25": "bm25",
        "FeaturizeConfig": "featurize",
        "FieldsConfig": "tables",
        "GroupingConfig": "request",
        "Interaction": "interaction",
        "Labels": "featurize",
        "RankEvaluateConfig": "evaluate",
        "RankRecoverConfig": "recover",
        "RankTrainConfig": "train",
        "RankingDataConfig": "data",
        "RankingLossConfig": "objective",
        "Request": "interaction",
        "SplitConfig": "split",
        "SyntheticConfig": "synthetic",
        "auc_difference": "metrics",
        "auc_interval": "metrics",
        "baseline_scores": "baselines",
        "calibration_error": "metrics",
        "delong_test": "auc",
        "encode_requests": "featurize",
        "expected_auc": "auc",
        "generate_requests": "synthetic",
        "group_log": "request",
        "kendall_tau": "metrics",
        "lambdaloss": "order_loss",
        "listmle": "order_loss",
        "listwise_divergence": "loss",
        "log_loss": "metrics",
        "ndcg": "metrics",
        "ranknet": "order_loss",
        "read_requests": "data",
        "read_table": "tables",
        "request_auc": "metrics",
        "roc_auc": "auc:auc",
        "split_requests": "split",
        "top_k_churn": "metrics",
        "write_pair_scores": "score_teacher",
    },
)
