"""Turns a request into what the engine is asked for: prompts as token ids, and the settings of `Options`."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenswift_py.errors import UserError, check, check_text
from tokenswift_py.loaded import LoadedModel
from tokenswift_py.options import Options
from tokenswift_py.serving.http import own
from tokenswift_py.serving.http.protocol import ChatRequest, CompletionRequest, Message, Request, ResponseRequest
from tokenswift_py.serving.http.refusals import Refusal
from tokenswift_py.serving.limits import Limits, check_depth, check_size
from tokenswift_py.text import Prompt, prompt_tokens, turn_tokens

SEED_BITS = 53  # the size of a seed that the server draws; JSON numbers of every language hold it


@dataclass(frozen=True)
class Asked:
    """The meaning of a request for the engine.

    prompts:  the token ids of each prompt.
    settings: the fields of `Options`, the same for all texts.
    choices:  the number of the prompt and the sample number (`Options.stream`) of each text.
    names:    the request's names for fields of `Options`, where they differ.
    priority: the urgency of the texts. Texts of higher priority are served first.
    """

    prompts: Sequence[list[int]]
    settings: dict[str, Any]
    choices: Sequence[tuple[int, int]]
    names: dict[str, str]
    priority: float = 0.0


class Server:
    """Checks requests against the model, the server's context and its limits."""

    def __init__(self, loaded: LoadedModel, context: int, limits: Limits):
        self.loaded, self.context, self.limits = loaded, context, limits

    def chat(self, request: ChatRequest) -> Asked:
        if request.top_logprobs and not request.logprobs:
            raise Refusal(400, "top_logprobs: only with logprobs", "top_logprobs")
        likeliest = (request.top_logprobs or 0) if request.logprobs else None
        settings = self.settings(request, request.response_format, likeliest)
        name = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
        prompt = [message.plain() for message in request.messages]
        most = request.max_completion_tokens or request.max_tokens
        return self.asked(request, settings, [("messages", prompt)], most, name, request.n)

    def completion(self, request: CompletionRequest) -> Asked:
        settings = {**self.settings(request, request.response_format, request.logprobs), "raw": True}
        if request.echo and request.logprobs is not None:
            if request.stream:
                raise Refusal(400, "logprobs: with echo only without stream", "logprobs")
            settings["prompt_logprobs"] = request.logprobs
        prompts: list[tuple[str, Prompt]] = [("prompt", prompt) for prompt in request.prompts()]
        return self.asked(request, settings, prompts, request.max_tokens, "max_tokens", request.n)

    def response(self, request: ResponseRequest) -> Asked:
        wanted = request.include or request.top_logprobs is not None
        likeliest = (request.top_logprobs or 0) if wanted else None
        settings = self.settings(request, request.text.format if request.text else None, likeliest)
        said = request.input
        messages = [{"role": "user", "content": said}] if isinstance(said, str) else [one.plain() for one in said]
        if request.instructions:
            messages.insert(0, {"role": "system", "content": request.instructions})
        return self.asked(request, settings, [("input", messages)], request.max_output_tokens, "max_output_tokens", 1)

    def settings(self, request: Request, form: Any, likeliest: int | None) -> dict[str, Any]:
        """Returns the settings of a request.

        form:      the form that the text must have.
        likeliest: the number of likeliest tokens that are told beside each token. None tells no probability at all.
        """
        settings = own.given(request)
        for name, value in settings.items():
            check_size(name, value)
        told = getattr(form, "json_schema", form)  # completions have the schema within, responses beside the type
        check_depth("response_format", getattr(told, "schema_", None))  # also where it is not used: it may be told back
        schema = form.wanted() if form else None
        if schema is not None:
            settings["json_schema"] = schema
        if likeliest is not None:
            settings["logprobs"] = likeliest
        return {"seed": secrets.randbits(SEED_BITS), **settings}

    def asked(
        self, request: Request, settings: dict[str, Any], prompts: Sequence[tuple[str, Prompt]], most: int | None,
        most_name: str, n: int | None,
    ) -> Asked:  # fmt: skip
        """Returns the meaning of a request for the engine.

        prompts:   the prompts, each with the name of its field.
        most:      the most tokens of each text.
        most_name: the field that says so.
        """
        texts, limits = len(prompts) * (n or 1), self.limits
        check(0 < texts <= limits.choices, "n", texts, f"1 to {limits.choices} texts in a request, prompts times n")
        names = {"max_new_tokens": most_name, "json_schema": "response_format", "prompt": prompts[0][0]}
        if most is not None:
            settings = {**settings, "max_new_tokens": most}
        try:
            found = [self.tokens(field, prompt, settings) for field, prompt in prompts]
            forced = self.turns(settings)
        except UserError as error:
            raise UserError(renamed(str(error), names)) from error
        longest = max(map(len, found)) + forced
        room = self.context - longest
        wanted = most or min(self.limits.default_tokens, room, self.limits.max_tokens or room)
        if room < max(wanted, 1):
            field, said = names["prompt"], f"the prompt has {longest} tokens" + (", turns included" if forced else "")
            asked = f", and {most_name} asks for {most} more" if most else ""
            message = f"{field}: {said}{asked}; this server's context has {self.context}"
            raise Refusal(400, message, most_name if longest < self.context else field, "context_length_exceeded")
        ceiling = limits.max_tokens or wanted
        check(wanted <= ceiling, most_name, wanted, f"this server writes at most {ceiling} tokens a text")
        first = request.sample or 0
        samples = [(prompt, first + number) for prompt in range(len(found)) for number in range(n or 1)]
        return Asked(found, {**settings, "max_new_tokens": wanted}, samples, names, request.priority or 0.0)

    def tokens(self, field: str, prompt: Prompt, settings: dict[str, Any]) -> list[int]:
        """Returns the token ids of a prompt."""
        options = Options.of(**settings)
        found = prompt_tokens(self.loaded.tokenizer, prompt, options.chat)
        most = self.limits.prompt_tokens or len(found)
        check(len(found) > 0, field, prompt, "it must not be empty")
        if len(found) > most:
            message = f"{field}: it has {len(found)} tokens; this server takes {most}"
            raise Refusal(400, message, field, "context_length_exceeded")
        return found

    def turns(self, settings: dict[str, Any]) -> int:
        """Returns the number of tokens of all turns that are forced into each text."""
        options, loaded = Options.of(**settings), self.loaded
        eos = loaded.ends(options)
        return sum(len(turn_tokens(loaded.tokenizer, turn, eos, options.chat)) for turn in options.chapters)

    def tokenized(self, prompt: str | None, messages: Sequence[Message] | None, special: bool | None) -> list[int]:
        """Returns the tokens of a request to /tokenize."""
        check((prompt is None) != (messages is None), "prompt", prompt, "either prompt or messages")
        if messages is not None:
            return prompt_tokens(self.loaded.tokenizer, [message.plain() for message in messages], Options().chat)
        assert prompt is not None
        check_text("prompt", prompt)
        found = self.loaded.tokenizer(prompt, add_special_tokens=special is not False).input_ids
        return [int(token) for token in found]

    def detokenized(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens, special tokens included. Raises UserError for ids that do not exist."""
        vocab = self.loaded.checkpoint.spec.vocab_size
        for token in tokens:
            check(token < vocab, "tokens", token, f"token ids are 0 to {vocab - 1}")
        return str(self.loaded.tokenizer.backend_tokenizer.decode(list(tokens), skip_special_tokens=False))


def renamed(message: str, names: dict[str, str]) -> str:
    """Returns a message about a field of `Options` with the name that the request has for the field."""
    field, colon, rest = message.partition(":")
    return f"{names.get(field, field)}{colon}{rest}"
