"""/v1/responses through the official SDK, against a node whose upstream has it. Prints what it saw."""

import json
import sys

import openai

url, key = sys.argv[1:3]
client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
ask = {"model": "responds", "input": "Hello there", "max_output_tokens": 8}
whole = client.responses.create(**ask)
said = {"text": whole.output_text, "cost": whole.usage.model_extra["cost"], "model": whole.model}
events = list(client.responses.create(**ask, stream=True))
said["events"] = [event.type for event in events]
said["deltas"] = "".join(e.delta for e in events if e.type == "response.output_text.delta")
said["stream_cost"] = events[-1].response.usage.model_extra["cost"]
with client.responses.stream(**ask) as stream:
    for _ in stream:
        pass
    said["final"] = stream.get_final_response().output_text
try:
    list(client.responses.create(**{**ask, "model": "responds-and-breaks"}, stream=True))
    said["broken"] = None
except openai.APIError as error:
    said["broken"] = type(error).__name__
print(json.dumps(said))
