"""Tools of others against the server: lm-eval's local-completions, guidellm. They live in .venv-clients."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from limbeck_server import RunningServer

from limbeck.models.load import load_model, load_tokenizer, locate
from limbeck.traces.synthetic import generate

CLIENTS = Path(__file__).parents[2] / ".venv-clients" / "bin"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CLIENTS.is_dir(), reason="make bench-clients")]
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PATH": "/usr/bin:/bin",
}

TASK = """
task: chain
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["1", "2", "3", "4"]
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def server():
    with RunningServer() as running:
        yield running


def test_lm_eval_reads_the_log_probs_of_a_plain_forward_pass(server, tmp_path):
    questions = [f"Given {trace.messages[-1]['content'].replace(' ', '')}\nSo " for trace in generate(8, 0, 2, 4)]
    data = tmp_path / "data.json"
    data.write_text("\n".join(json.dumps({"question": question}) for question in questions))
    (tmp_path / "chain.yaml").write_text(TASK.format(file=data))
    where = f"base_url={server.url}/v1/completions,model=tiny-student,num_concurrent=2,max_length=512"
    tokenizer = f"tokenizer_backend=huggingface,tokenizer={locate('tiny-student').path}"
    command = [CLIENTS / "lm_eval", "--model", "local-completions", "--model_args", f"{where},{tokenizer}"]
    command += ["--tasks", "chain", "--include_path", tmp_path, "--log_samples", "--output_path", tmp_path / "out"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=OFFLINE | {"HF_HOME": str(tmp_path)}, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == len(questions)
    model, encode = load_model("tiny-student"), load_tokenizer("tiny-student")
    for row in rows:
        ids = encode(row["doc"]["question"])["input_ids"]
        with torch.inference_mode():
            after = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        for choice, found in zip("1234", row["filtered_resps"], strict=True):
            (token,) = encode(choice)["input_ids"]
            assert float(found[0]) == pytest.approx(float(after[token]), abs=2e-4)
            assert str(found[1]) == str(int(after.argmax()) == token)


@pytest.mark.parametrize("kind", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm_finds_no_error(server, tmp_path, kind):
    report = tmp_path / "report.json"
    command = [CLIENTS / "guidellm", "run", "--disable-console", "--profile", "kind=constant,rate=5"]
    command += ["--backend", f"kind=openai_http,target={server.url},request_format={kind}"]
    command += ["--constraint", "kind=max_requests,count=20", "--output", f"kind=json,path={report}"]
    command += ["--tokenizer", f"kind=hf_auto,model={locate('tiny-student').path}"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=OFFLINE | {"HF_HOME": str(tmp_path)}, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    totals = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    assert totals["errored"] == 0 and totals["successful"] >= 15
