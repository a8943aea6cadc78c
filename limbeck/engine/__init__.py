"""Scoring and generation: one decoder for all that reads or writes with a model.

Example:
    from limbeck.engine import Generator, GenerationConfig, Job, Sampling, Scorer, load_decoder, text_request
    from limbeck.models import load_tokenizer

    tokenizer, scorer = load_tokenizer("tiny-student"), Scorer(load_decoder("tiny-student"))
    scores = scorer.score([text_request(tokenizer, "3+4", ["=7", "=8"], ["+", "-"])])[0]
    generator = Generator(scorer.decoder, scorer.cache, GenerationConfig())
    generator.add(Job(prompt=tokenizer.encode("3+4="), max_tokens=4, sampling=Sampling(temperature=0.7, seed=1)))
    while generator.running:
        tokens = [drawn.token for progress in generator.step() for drawn in progress.tokens]
"""

from limbeck.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "Decoder": "decoder",
        "GenerationConfig": "generation",
        "Generator": "generation",
        "Grammars": "constraints",
        "Job": "jobs",
        "PrefixCache": "prefix_cache",
        "Request": "requests",
        "Sampling": "sampling",
        "Scorer": "scoring",
        "Scores": "requests",
        "ScoringConfig": "scoring",
        "SpeculativeConfig": "speculative",
        "ThoughtBudget": "jobs",
        "choice": "constraints",
        "json_schema": "constraints",
        "label_ids": "requests",
        "load_decoder": "backends",
        "make_drafter": "drafter",
        "regex": "constraints",
        "text_request": "requests",
    },
)
