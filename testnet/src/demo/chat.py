"""One request through the official OpenAI SDK, as any developer would make it: prints an object."""

import json
import sys
import time

import openai

ask = json.load(sys.stdin)
client = openai.OpenAI(base_url=ask["base_url"], api_key=ask["api_key"], max_retries=0)
begun = time.monotonic()
if "input" in ask:
    raw = client.embeddings.with_raw_response.create(model=ask["model"], input=ask["input"])
    said = f"{len(raw.parse().data)} vectors of {len(raw.parse().data[0].embedding)} numbers"
else:
    raw = client.chat.completions.with_raw_response.create(
        model=ask["model"],
        messages=[{"role": "user", "content": ask["content"]}],
        temperature=0,
        max_tokens=48,
        extra_body={"provider": {"sort": "price"}},
    )
    said = raw.parse().choices[0].message.content
usage = raw.parse().usage.model_dump()
print(json.dumps({
    "said": said,
    "node": raw.headers["x-leasehold-node"],
    "cost": format(usage["cost"], ".9f").rstrip("0").rstrip("."),
    "tokens": usage["total_tokens"],
    "took_ms": round((time.monotonic() - begun) * 1000),
}))
