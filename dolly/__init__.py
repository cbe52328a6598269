"""Dolly: fine-tune an open causal language model on your own instructions, and chat with it.

The modules, ground floor first (each imports only from floors below its own):

    errors, prompt, records, config      what a mistake, a prompt, a record and a setting are
    packing, model, attention            token rows; loading a base and saving the package; a row's documents apart
    trainer, engine                      the training loop; the token loop of the chat
    report, hub                          the model card; pushing to the Hugging Face Hub
    chat, texts                          the Gradio page and its words
"""

import os

# Read when the libraries are imported: nothing is reported to anyone unless the user switches it on.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
