"""Tools of others against the server: lm-eval, guidellm, litellm, langchain-openai. They live in .venv-clients."""

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


LITELLM = """
import json, sys
import litellm
url, messages = sys.argv[1], json.loads(sys.argv[2])
where = {"model": "openai/tiny-student", "api_base": url + "/v1", "api_key": "none"}
whole = litellm.completion(messages=messages, temperature=0, max_tokens=300, **where)
parts = litellm.completion(messages=messages, temperature=0, max_tokens=300, stream=True, **where)
text = "".join(part.choices[0].delta.content or "" for part in parts)
errors = []
for ask in (
    lambda: litellm.completion(messages=[{"role": "user", "content": "1" * 3000}], **where),
    lambda: litellm.completion(messages=messages, **{**where, "model": "openai/another"}),
):
    try:
        ask()
    except Exception as error:
        errors.append(type(error).__name__)
content = whole.choices[0].message.content
print(json.dumps({"content": content, "streamed": text, "tokens": whole.usage.completion_tokens, "errors": errors}))
"""

LANGCHAIN = """
import json, sys
from langchain_openai import ChatOpenAI, OpenAI
url, messages = sys.argv[1], json.loads(sys.argv[2])
where = {"model": "tiny-student", "base_url": url + "/v1", "api_key": "none", "temperature": 0, "max_retries": 0}
chat = ChatOpenAI(max_tokens=300, **where)
whole = chat.invoke(messages)
text = "".join(part.content for part in chat.stream(messages))
errors = []
for ask in (
    lambda: chat.invoke("1" * 3000),
    lambda: ChatOpenAI(**{**where, "model": "another"}).invoke(messages),
):
    try:
        ask()
    except Exception as error:
        errors.append(type(error).__name__)
assert OpenAI(max_tokens=5, **where).invoke("12")
tokens = whole.usage_metadata["output_tokens"]
print(json.dumps({"content": whole.content, "streamed": text, "tokens": tokens, "errors": errors}))
"""


@pytest.mark.parametrize(
    ("script", "errors"),
    [
        (LITELLM, ["ContextWindowExceededError", "NotFoundError"]),
        (LANGCHAIN, ["OpenAIContextOverflowError", "OpenAIModelNotFoundError"]),
    ],
    ids=["litellm", "langchain-openai"],
)
def test_client_libraries_get_words_counts_and_their_own_errors(server, tmp_path, script, errors):
    messages = [{"role": "user", "content": "7a+4b*3c-8d+9"}]
    expected = server.post("/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 300}).json()
    done = subprocess.run(
        [CLIENTS / "python", "-c", script, server.url, json.dumps(messages)],
        capture_output=True,
        text=True,
        env=OFFLINE | {"HOME": str(tmp_path), "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    content = expected["choices"][0]["message"]["content"]
    assert found["content"] == found["streamed"] == content and content.isdigit()
    assert found["tokens"] == expected["usage"]["completion_tokens"]
    assert found["errors"] == errors
