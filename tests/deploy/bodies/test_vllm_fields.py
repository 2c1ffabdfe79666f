"""Every field that vLLM publishes for completions and chats is honoured, refused by name, or harmless for a reason."""

from __future__ import annotations

from elastic_moe.deploy.bodies.schema import ChatCompletionRequest, CompletionRequest

BOTH = {
    *("model", "frequency_penalty", "logit_bias", "max_tokens", "n", "presence_penalty", "seed", "stop", "stream"),
    *("stream_options", "temperature", "top_p", "user", "use_beam_search", "top_k", "min_p", "repetition_penalty"),
    *("length_penalty", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "logprobs"),
    *("skip_special_tokens", "spaces_between_special_tokens", "truncate_prompt_tokens", "truncation_side", "echo"),
    *("allowed_token_ids", "prompt_logprobs", "logprob_token_ids", "add_special_tokens", "response_format"),
    *("structured_outputs", "priority", "request_id", "return_tokens_as_token_ids", "return_token_ids", "cache_salt"),
    *("kv_transfer_params", "ec_transfer_params", "vllm_xargs", "repetition_detection", "watermarking"),
    *("routed_experts_prompt_start", "return_token_offsets", "session_id", "stream_interval"),
    *("logits_processors", "thinking_token_budget"),
}
COMPLETION = BOTH | {
    *("prompt", "suffix", "prompt_embeds"),
    *("max_repetition_pattern_size", "min_repetition_pattern_size", "repetition_min_count"),
}
CHAT = BOTH | {
    *("messages", "top_logprobs", "max_completion_tokens", "tools", "tool_choice", "reasoning_effort", "bad_words"),
    *("include_reasoning", "parallel_tool_calls", "add_generation_prompt", "continue_final_message", "documents"),
    *("chat_template", "chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs", "return_prompt_text"),
    *("return_mm_kwargs",),
}


def test_none_is_ignored_in_silence() -> None:
    for published, body in ((COMPLETION, CompletionRequest), (CHAT, ChatCompletionRequest)):
        decided = set(body.model_fields) | set(body.UNSUPPORTED)
        assert published - decided - body.HARMLESS == set()
        assert not set(body.model_fields) & set(body.UNSUPPORTED)
