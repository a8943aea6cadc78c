"""What a teacher says at the supervised positions: of a live model, of a cache on disk, of a server.

Example:
    import torch
    from limbeck.teacher import DenseTargets, TopKTargets

    dense = DenseTargets(hidden=torch.randn(5, 8), head_weight=torch.randn(40, 8))
    log_probs, ids = dense.logits().log_softmax(-1).topk(4)
    kept = TopKTargets(ids, log_probs, torch.log1p(-log_probs.exp().sum(-1)))
    kept.entropy(vocab=40), dense.entropy(vocab=40)
"""

from limbeck.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "CacheConfig": "cache",
        "DenseTargets": "dense",
        "LiveTeacher": "live",
        "OneTeacherTargets": "targets",
        "ServedTeacher": "served",
        "ProjectedTargets": "projected",
        "SeveralTargets": "targets",
        "SeveralTeachers": "several",
        "Teacher": "several",
        "TeacherCache": "cache",
        "TeacherTargets": "targets",
        "TopKTargets": "topk",
        "build_cache": "build",
    },
)
