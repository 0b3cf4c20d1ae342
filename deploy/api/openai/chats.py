"""ChatFormat: how one model thinks and calls tools, as its chat template says."""

from collections.abc import Callable
from dataclasses import replace

from deploy.api.grammars.bounds import check_schema
from deploy.api.grammars.wanted import WantedGrammar
from deploy.api.http.errors import ApiError
from deploy.api.openai.requests import ChatCompletionRequest
from deploy.api.openai.structured import cannot_combine
from deploy.api.reading.parts import ChatReader, PlainReader, Reader
from deploy.api.reading.reasoning import ReasoningReader, is_open, thinks
from deploy.api.reading.tool_formats import ToolFormat, calls_rules, format_of


class ChatFormat:
    """The format of a model's answers, found in the text of its chat template.

    Stateless; any thread may use it.
    """

    def __init__(self, template: str) -> None:
        self._thinks = thinks(template)
        self._tools = format_of(template)

    def wanted_grammar(self, body: ChatCompletionRequest) -> WantedGrammar | None:
        """Return the form that the whole answer has to have, None if it is free.

        It covers thoughts, too: a constrained answer has none. Where a constraint is asked for and the model
        may call tools, the model may choose between them. Raises ApiError.
        """
        constraint = body.output_constraint()
        if not body.offered:
            return constraint
        if constraint and body.forced:
            raise cannot_combine(constraint.field, "tool_choice")
        if not constraint and not body.forced:
            return None
        functions = [tool.function for tool in body.forced or body.offered]
        several = body.parallel_tool_calls and not body.names_tool
        call_rules = self._format().call_rules
        try:
            check_schema([function.parameters for function in functions])
            rules = calls_rules(call_rules(functions), several=several)
        except ValueError as error:
            raise ApiError(400, f"tools: {error}", param="tools") from error
        return replace(constraint, calls=rules) if constraint else WantedGrammar("tools", "calls", rules)

    def new_reader(self, body: ChatCompletionRequest, *, prompt: str) -> Callable[[], Reader]:
        """Return a factory of readers of the answers to a rendered prompt.

        Raises ApiError for tools that this model cannot call.
        """
        offered = [tool.function for tool in body.offered]
        tools = self._format() if offered else None
        reasons = self._thinks and body.output_constraint() is None and not body.forced
        opened = is_open(prompt)
        max_calls = None if body.parallel_tool_calls else 1

        def reader() -> Reader:
            reasoning = ReasoningReader(is_open=opened) if reasons else PlainReader()
            calls = tools.new_reader(offered) if tools else PlainReader()
            return ChatReader(reasoning, calls, max_calls=max_calls)

        return reader if reasons or tools else PlainReader

    def _format(self) -> ToolFormat:
        if self._tools is None:
            message = "The chat template of this model has no format of tool calls that is known here."
            raise ApiError(400, message, param="tools")
        return self._tools
