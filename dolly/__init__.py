"""Dolly: fine-tune an open causal language model on your own instructions, and chat with it.

The modules in reading order; each imports only from those named before it:

    errors, prompt, records, config      what a mistake, a prompt, a record and a setting are
    packing, model, attention            token rows; loading a base and saving the package; a row's documents apart
    progress, trainer, engine            the training loop and what one sees of it; the token loop of the chat
    report, hub                          the model card; pushing to the Hugging Face Hub
    texts, chat                          the words of the Gradio page, and the page
"""

import os

# Read when the libraries are imported: nothing is reported to anyone unless the user switches it on.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
