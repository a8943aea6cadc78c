"""The names that users import: which they are, that they hold whatever was imported before, and what they cost."""

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import textwrap

import pytest

import limbeck
from limbeck.commands import COMMANDS
from limbeck.stage import function_name

TOP = """
    Checkpoint CheckpointError CompressionError ConfigError DataError LimbeckError ModelError PairError ShapeError
    TemplateError TraceFormatError __version__ advise advise_cut bench_server cache_ranker
    cache_teacher compress
    cost count_traces demo describe_teacher_cache distill doctor engine evaluate evaluate_ranker export
    export_teacher_cache generate_traces import_teacher_cache import_traces load models moments optim pipeline plan
    probe_traces prune quantize ranking recover recover_ranker report scale serve show_evaluation show_ranking
    show_traces sweep teacher traces train_ranker verify_teacher_cache verify_traces complete_traces
"""
PACKAGES = {
    "traces": """
        Batch Cut Example Markers RenderConfig Sample SelectConfig SupervisionConfig Trace TraceConfig
        TruncationConfig apply_cut collate common_length fit_cut generate_chain make_example parse_record read_problems
        read_traces
        render_prompt render_trace select_traces split_thought split_traces stop_ids token_weights truncate_sample
        write_jsonl
    """,
    "teacher": """
        CacheConfig DenseTargets LiveTeacher OneTeacherTargets ProjectedTargets ServedTeacher SeveralTargets
        SeveralTeachers Teacher TeacherCache TeacherTargets TopKTargets build_cache
    """,
    "models": """
        Head ScratchConfig Sizes ask_model backbone_of head_of hidden_states load_model load_scratch
        load_tokenizer model_hash scratch_model sizes_of symbol_tokenizer
    """,
    "engine": """
        Decoder GenerationConfig Generator Grammars Job PrefixCache Request Sampling Scorer Scores ScoringConfig
        SpeculativeConfig ThoughtBudget choice json_schema label_ids load_decoder make_drafter regex text_request
    """,
    "optim": """
        AGLD ASG ASGLD AccumulationSchedule BatchGrowth CyclicalSampling EqualLR GrowingBatchSampler NEON NoisySGD
        OptimizerConfig PSGLD Perturb PerturbedGD PerturbedSGD RankSquares SAM SGHMC SGLD SGNHT ScheduleConfig
        build_optimizer jitter_ second_order
    """,
    "distill": """
        DistillConfig DivergenceConfig FusedLoss LoraConfig LossConfig OnPolicyConfig ParallelConfig SourceConfig
        StudentConfig TeacherConfig TrainingConfig combined_kl forward_kl fused_loss jsd plan_steps predict_distill
        reverse_kl skew_kl skew_reverse_kl tvd
    """,
    "evaluate": """
        AnswerChecker EvaluateConfig EvaluateStageConfig Interval Overlap PerplexityConfig Problem Task Verdict
        VerifyConfig accuracy avg_at_n check_exact check_math evaluate_model extract_answer mean_interval
        paired_difference paired_retention pass_at_k pass_rates ratio_interval share_interval stop_rate
        task_from_traces
    """,
    "compress": """
        BudgetConfig CalibrationConfig GateConfig LayerProblem Moments RecoverConfig calibration_rows layer_error
        predict_prune predict_quantize predict_recover read_masks retarget walk_layers
    """,
    "compress.prune": """
        AlpsConfig MagnitudeConfig OsscarConfig Pattern PruneConfig RefitConfig SparseGptConfig WandaConfig
        refit_weight solve_alps solve_magnitude solve_osscar solve_sparsegpt solve_wanda
    """,
    "compress.quantize": """
        AwqConfig GptqConfig Grid JointConfig MixedConfig QuantEaseConfig QuantizeConfig Quantized RtnConfig
        SmoothQuantConfig awq_factors smoothquant_factors solve_gptq solve_joint solve_quantease solve_rtn
    """,
    "compress.export": """
        CertificateConfig ExportConfig Finding Probes lint_directory probes_of write_certificate write_compressed
        write_dense write_gguf
    """,
    "ranking": """
        Bm25 FeaturizeConfig FieldsConfig GroupingConfig Interaction Labels RankEvaluateConfig RankRecoverConfig
        RankTrainConfig RankingDataConfig RankingLossConfig Request SplitConfig SyntheticConfig auc_difference
        auc_interval baseline_scores calibration_error delong_test encode_requests expected_auc generate_requests
        group_log kendall_tau lambdaloss listmle listwise_divergence log_loss ndcg ranknet read_requests read_table
        request_auc roc_auc split_requests top_k_churn write_pair_scores
    """,
    "report": """
        Evidence Plot ReportConfig Row Table collect_evidence compression_table console_table csv_text markdown
        rows_of score_table write_report
    """,
    "sweep": "CutAdviceConfig PlannedRun SweepConfig on_frontier plan_runs predict_sweep run_name",
    "serve": "BenchServeConfig Gate LimitsConfig ServeConfig Server Service make_app",
    "pipeline": "CardConfig ChooseConfig HubConfig PipelineConfig RankPipelineConfig SmokeConfig",
    "cost": """
        DEVICES Dims Hardware Prediction config_of frozen_sizes hardware_of measure_hardware on_meta
        predict_sampling total training_memory
    """,
    "scale": """
        Advice AdviseConfig AssumedTraces Estimate Load PlanConfig Requests Times advice_for best_plans estimate
        formats_of times_of
    """,
}
CALLABLE = ("demo", "distill", "doctor", "evaluate", "pipeline", "report", "serve", "sweep")
"""Modules that are the function of the command of their name."""
HEAVY = ("torch", "numpy", "transformers", "pydantic", "yaml", "rich", "datasets", "httpx", "matplotlib", "fastapi")
IN_BOTH_ORDERS = """
import importlib, pkgutil, sys
import limbeck

def import_modules(package):
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith(("score_", "start_", "ray_")):  # of other engines
            continue
        importlib.import_module(f"{package.__name__}.{module.name}")

def names_of(package):
    return {name: getattr(package, name) for name in package.__all__}

packages = [importlib.import_module(name) for name in sys.argv[2:]]
if sys.argv[1] == "modules first":
    for package in packages:
        import_modules(package)
first = {package: names_of(package) for package in packages}
for package in packages:
    import_modules(package)
for package, names in first.items():
    for name, found in names.items():
        again = getattr(package, name)
        assert again is found, f"{package.__name__}.{name} was {found} and is {again}"
for name in CALLABLE:
    assert callable(getattr(limbeck, name)), name
""".replace("CALLABLE", repr(CALLABLE))


def run(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def package_of(name):
    return importlib.import_module(f"limbeck.{name}")


def test_the_names_of_the_top_are_these():
    assert sorted(limbeck.__all__) == sorted(TOP.split())


@pytest.mark.parametrize("name", PACKAGES)
def test_the_names_of_a_package_are_these(name):
    assert package_of(name).__all__ == PACKAGES[name].split()


@pytest.mark.parametrize("name", PACKAGES)
def test_no_name_is_that_of_a_module(name):
    package = package_of(name)
    assert not {module.name for module in pkgutil.iter_modules(package.__path__)} & set(package.__all__)


@pytest.mark.parametrize("name", ["", *PACKAGES])
def test_every_name_is_there_listed_and_documented(name):
    package = package_of(name) if name else limbeck
    for public in package.__all__:
        found = getattr(package, public)
        assert public in dir(package)
        if callable(found):
            assert inspect.getdoc(found), public
    with pytest.raises(AttributeError, match="no attribute 'nothing_like_it'"):
        package.nothing_like_it  # noqa: B018


def test_every_command_is_a_function_of_its_name():
    assert {function_name(name) for name in COMMANDS} <= set(limbeck.__all__)
    for name in COMMANDS:
        function = getattr(limbeck, function_name(name))
        assert callable(function), name
        assert COMMANDS[name].load().subject in (None, *inspect.signature(function).parameters)


@pytest.mark.parametrize("order", ["names first", "modules first"])
def test_names_stay_what_they_are_whatever_is_imported(order):
    run(IN_BOTH_ORDERS, order, "limbeck", *(f"limbeck.{name}" for name in PACKAGES))


def test_a_module_that_is_a_function_can_be_called_and_imported_from(tmp_path):
    for name in CALLABLE:
        with pytest.raises(limbeck.ConfigError, match=f"limbeck.{name}: .*no_such_field"):
            getattr(limbeck, name)(no_such_field=1)
        module = importlib.import_module(f"limbeck.{name}")
        assert module is getattr(limbeck, name)


def test_a_package_imports_nothing_heavy():
    names = ", ".join(f"limbeck.{name}" for name in PACKAGES)
    code = f"import sys, limbeck, {names}; print(*(name for name in {HEAVY} if name in sys.modules))"
    assert run(code).split() == []


def test_the_library_is_imported_in_a_tenth_of_the_time_of_torch():
    def seconds(module):
        code = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
        return min(float(run(code)) for _ in range(2))

    assert seconds("limbeck") < 0.1 * seconds("torch")


@pytest.mark.parametrize("name", ["", *PACKAGES])
def test_the_example_of_a_package_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package = package_of(name) if name else limbeck
    example = re.search(r"^Example:\n((?:    .*\n|\n)+)", package.__doc__, re.M)[1]
    exec(compile(textwrap.dedent(example), f"example of {package.__name__}", "exec"), {})
