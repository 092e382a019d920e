"""ChatML: its tokens, and the template by which `transformers` renders what `encode/documents.py` does."""

IM_START, IM_END = "<|im_start|>", "<|im_end|>"

# A newline between turns, none after the last.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)
