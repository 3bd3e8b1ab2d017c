"""What the official OpenAI SDK for Python does against a node, as JSON for the test that runs it.

Arguments: the base URL, a key, the chat model, the embeddings model.
"""

import asyncio
import json
import math
import sys

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
