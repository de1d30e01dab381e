"""`/tokenize` and `/detokenize`: what a prompt becomes, and back."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from server.api.dependencies import ServiceDep, read_body
from server.api.documentation import documented
from server.errors import InvalidRequestError
from server.wire.tokenize import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse

router = APIRouter(tags=["Tokens"])
ERRORS = (400, 404, 405, 408, 413, 415, 500, 503)


@router.post("/tokenize", **documented(TokenizeResponse, ERRORS, body=TokenizeRequest))
async def tokenize(request: Request, service: ServiceDep) -> Response:
    """The token ids of a prompt, or of a conversation as the chat template writes it."""
    body = await read_body(request, TokenizeRequest)
    service.check_model(body.model)
    if body.messages is not None:
        tokens = await service.prompter.chat(body.conversation())
    else:
        tokens = await service.prompter.text(body.prompt or "", body.add_special_tokens is not False)
    answer = TokenizeResponse(
        count=len(tokens),
        max_model_len=service.engine.info.max_model_len,
        tokens=list(tokens),
        token_strs=service.prompter.token_strings(tokens) if body.return_token_strs else None,
    )
    return Response(answer.to_json(), media_type="application/json")


@router.post("/detokenize", **documented(DetokenizeResponse, ERRORS, body=DetokenizeRequest))
async def detokenize(request: Request, service: ServiceDep) -> Response:
    """The text of token ids."""
    body = await read_body(request, DetokenizeRequest)
    service.check_model(body.model)
    size = len(service.prompter.vocabulary)
    if body.tokens and (worst := max(body.tokens)) >= size:
        raise InvalidRequestError(
            f"tokens: id {worst} is outside the tokenizer's vocabulary (0 to {size - 1}).", param="tokens"
        )
    return Response(
        DetokenizeResponse(prompt=await service.prompter.decode(body.tokens)).to_json(), media_type="application/json"
    )
