"""Run as a process of its own: llama.cpp's server from the xllamacpp wheel, with llama-server's flags.

python start_llama_cpp.py --model FILE --host H --port P --alias NAME --ctx-size N [--threads N]
"""

import argparse
import os
import signal

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--model", "--host", "--alias"):
        parser.add_argument(name, required=True)
    for name in ("--port", "--ctx-size"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--threads", type=int)
    asked = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = asked.model, {asked.alias}
    params.hostnames, params.port, params.n_ctx = [asked.host], asked.port, asked.ctx_size
    if asked.threads is not None:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = asked.threads
    if "LLAMA_API_KEY" in os.environ:
        params.api_keys = [os.environ["LLAMA_API_KEY"]]
    stops = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # its threads inherit that, so that the signal comes here
    server = xllamacpp.Server(params)
    print(f"llama.cpp serves {asked.alias} at {server.listening_address}", flush=True)
    signal.sigwait(stops)
    os._exit(0)  # its destructor waits for idle connections


if __name__ == "__main__":
    main()
