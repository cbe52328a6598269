"""Dolly: fine-tune an open causal language model on your own instructions, and chat with it.

The modules in reading order; each imports only from those named before it:

    errors, prompt, records, config      what a mistake, a prompt, a record and a setting are
    launch                               what the first of several processes prepares for all
    packing, model, adapters             token rows; loading a base and saving the package; LoRA and QLoRA
    attention, head                      a row's documents apart; the LM head and its loss in one
    progress, distributed, checkpoint    what one sees of a run; its processes; its state, whole or absent
    trainer, engine                      the training loop; the token loop of the chat
    report, hub                          the model card; pushing to the Hugging Face Hub
    texts, chat                          the words of the Gradio page, and the page
"""

import logging
import os

# Read when the libraries are imported: nothing is reported to anyone unless the user switches it on.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
# bitsandbytes says when imported that it would like another package, for a format that is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
