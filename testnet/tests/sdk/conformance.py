"""What the official OpenAI SDK for Python does against a node, as JSON for the test that runs it.

Arguments: the base URL, a key, the chat model, the embeddings model.
"""

import asyncio
import json
import math
import sys
import time

import openai

url, key, chat, embeddings = sys.argv[1:]
said = {"version": openai.__version__}
client = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=120)
messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
ask = {"model": chat, "messages": messages, "max_tokens": 12, "temperature": 0, "seed": 7}


def close(one, other):
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    return dot / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))


# Models.
listed = client.models.list()
said["models"] = sorted(model.id for model in listed)
model = client.models.retrieve(chat)
said["model"] = {"id": model.id, "object": model.object, "owned_by": model.owned_by}

# Chat.
raw = client.chat.completions.with_raw_response.create(**ask)
whole = raw.parse()
said["chat"] = {
    "text": whole.choices[0].message.content,
    "role": whole.choices[0].message.role,
    "finish": whole.choices[0].finish_reason,
    "model": whole.model,
    "prompt": whole.usage.prompt_tokens,
    "completion": whole.usage.completion_tokens,
    "total": whole.usage.total_tokens,
    "cost": whole.usage.model_extra["cost"],
    "request_id": whole._request_id,
    "node": raw.headers["x-leasehold-node"],
}

# When there is time.
flex = client.chat.completions.create(**ask, service_tier="flex")
said["flex"] = {
    "text": flex.choices[0].message.content,
    "tier": flex.service_tier,
    "cost": flex.usage.model_extra["cost"],
}

# A stream.
text, usage, chunks, finish = "", None, 0, None
for chunk in client.chat.completions.create(
    **ask, stream=True, stream_options={"include_usage": True}
):
    chunks += 1
    if chunk.usage is not None:
        usage = chunk.usage
    for choice in chunk.choices:
        text += choice.delta.content or ""
        finish = choice.finish_reason or finish
said["stream"] = {
    "text": text,
    "chunks": chunks,
    "finish": finish,
    "completion": usage.completion_tokens,
    "cost": usage.model_extra["cost"],
}

# The older endpoint.
old = client.completions.create(
    model=chat, prompt="Once upon a time", max_tokens=5, temperature=0
)
said["completion"] = {"text": old.choices[0].text, "tokens": old.usage.completion_tokens}

# Probabilities.
likely = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3)
token = likely.choices[0].logprobs.content[0]
said["logprobs"] = {
    "token": token.token,
    "logprob": token.logprob,
    "top": len(token.top_logprobs),
}

# Embeddings: the SDK asks for base64 where nothing is said.
texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "The stock market fell sharply."]
packed = client.embeddings.create(model=embeddings, input=texts)
plain = client.embeddings.create(model=embeddings, input=texts, encoding_format="float")
vectors = [item.embedding for item in packed.data]
said["embeddings"] = {
    "length": [len(vector) for vector in vectors],
    "order": [item.index for item in packed.data],
    "near": close(vectors[0], vectors[1]),
    "far": close(vectors[0], vectors[2]),
    "encodings": max(
        abs(a - b)
        for one, other in zip(packed.data, plain.data, strict=True)
        for a, b in zip(one.embedding, other.embedding, strict=True)
    ),
    "prompt": packed.usage.prompt_tokens,
}

# Errors, by the class that is raised.
errors = {}


def fails(name, call):
    try:
        call()
        errors[name] = {"class": None}
    except openai.APIError as error:
        errors[name] = {
            "class": type(error).__name__,
            "status": getattr(error, "status_code", None),
            "code": error.code,
            "param": error.param,
            "type": error.type,
        }


fails("key", lambda: openai.OpenAI(base_url=url, api_key="lh-none", max_retries=0).models.list())
fails("model", lambda: client.chat.completions.create(**{**ask, "model": "gpt-9"}))
fails("parameter", lambda: client.chat.completions.create(**{**ask, "temperature": 9}))
fails("unknown", lambda: client.chat.completions.create(**ask, extra_body={"temprature": 1}))
tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
fails("tools", lambda: client.chat.completions.create(**ask, tools=[tool]))
long = [{"role": "user", "content": "word " * 40_000}]
fails("context", lambda: client.chat.completions.create(**{**ask, "messages": long}))
said["errors"] = errors

# A batch: a file of requests in, one of answers and one of errors out.
lines = [
    {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": {**ask, **more}}
    for name, more in [("one", {}), ("two", {"max_tokens": 4}), ("three", {"model": "gpt-9"})]
]
content = "\n".join(json.dumps(line) for line in lines).encode()
file = client.files.create(file=("requests.jsonl", content), purpose="batch")
batch = client.batches.create(
    input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
)
until = time.monotonic() + 120
while batch.status not in ("completed", "failed", "expired", "cancelled"):
    assert time.monotonic() < until, batch
    time.sleep(0.1)
    batch = client.batches.retrieve(batch.id)


def results(file_id):
    read = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    return {line["custom_id"]: line["response"] for line in read}


answers, refused = results(batch.output_file_id), results(batch.error_file_id)
counts = batch.request_counts
said["batch"] = {
    "status": batch.status,
    "counts": [counts.total, counts.completed, counts.failed],
    "texts": {
        name: answer["body"]["choices"][0]["message"]["content"]
        for name, answer in answers.items()
    },
    "costs": {name: answer["body"]["usage"]["cost"] for name, answer in answers.items()},
    "refused": {
        name: [answer["status_code"], answer["body"]["error"]["code"]]
        for name, answer in refused.items()
    },
    "listed": batch.id in [one.id for one in client.batches.list()],
    "deleted": client.files.delete(file.id).deleted,
}

# One who breaks off a stream, and goes on with something else.
endless = {**ask, "max_tokens": 1_500, "messages": [
    {"role": "user", "content": "Write a very long story about the sea and everything in it."}
]}
stream = client.chat.completions.create(**endless, stream=True)
taken = 0
for chunk in stream:
    taken += 1
    if taken == 4:
        break
stream.close()
said["cancelled"] = {"taken": taken}


async def asynchronous():
    """Several at once, and one that is cancelled as asyncio does it."""
    async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as client:
        several = await asyncio.gather(
            *(client.chat.completions.create(**{**ask, "max_tokens": 4}) for _ in range(4))
        )
        task = asyncio.create_task(client.chat.completions.create(**endless))
        await asyncio.sleep(0.5)
        task.cancel()
        try:
            await task
            cancelled = False
        except asyncio.CancelledError:
            cancelled = True
        return {
            "texts": sorted({answer.choices[0].message.content for answer in several}),
            "cancelled": cancelled,
        }


said["asynchronous"] = asyncio.run(asynchronous())
print(json.dumps(said))
