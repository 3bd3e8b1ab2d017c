"""llama.cpp beside the embedded engine: `python -c THIS MODEL.gguf THREADS`.

Reads one JSON object a line, {"prompt": [tokens], "decode": n}, and answers {"seconds": s}: for the
prompt where n is 0, else for n tokens after it and one more. Its first line is {"version": v}.
"""

import json
import sys
import time

import llama_cpp
import numpy as np


def main():
    threads = int(sys.argv[2])
    llama = llama_cpp.Llama(
        sys.argv[1], n_ctx=2048, n_threads=threads, n_threads_batch=threads, n_batch=512,
        n_ubatch=512, verbose=False,
    )
    print(json.dumps({"version": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        llama.reset()
        start = time.perf_counter()
        llama.eval(asked["prompt"])
        token = likeliest(llama)
        if asked["decode"]:
            start = time.perf_counter()
            for _ in range(asked["decode"]):
                llama.eval([token])
                token = likeliest(llama)
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


def likeliest(llama):
    logits = llama._ctx.get_logits_ith(-1)
    return int(np.argmax(np.ctypeslib.as_array(logits, shape=(llama.n_vocab(),))))


main()
