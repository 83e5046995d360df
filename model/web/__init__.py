"""The web page of `python lmdeploy_cli.py serve gradio`: a chat with whatever an OpenAI-style
endpoint serves. page.py lays it out, client.py asks the endpoint, server.py sends it to browsers;
page.js and page.css run in the browser, and texts.py has every word in both languages."""
