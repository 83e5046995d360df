// The conversations of this browser. Each has its own entry in localStorage, so that two tabs never
// overwrite each other's; which one a tab shows is in its sessionStorage and survives a reload.
const yuanmeng = (() => {
  const PREFIX = "yuanmeng.conversation.";
  const CURRENT = "yuanmeng.current";
  const SETTINGS = "yuanmeng.parameters";
  const MAX_CONVERSATIONS = 100; // beyond, the one unused for longest goes

  const WIDE = 768; // pixels from which the sidebar stands beside the conversation, not over it

  const textOf = (content) =>
    typeof content === "string" ? content : content.map((part) => part.text ?? "").join("");
  const current = () => sessionStorage.getItem(CURRENT);
  const read = (id) => JSON.parse(localStorage.getItem(PREFIX + id));
  let chosen = null; // in the list
  let known = "null"; // what this tab last read or wrote of its conversation, as JSON

  function saved() { // newest first
    return Object.keys(localStorage)
      .filter((key) => key.startsWith(PREFIX))
      .map((key) => ({ id: key.slice(PREFIX.length), ...JSON.parse(localStorage[key]) }))
      .sort((a, b) => b.time - a.time);
  }

  function list() { // an update of the Radio
    const choices = saved().map(({ id, title }) => [title, id]);
    return { __type__: "update", choices, value: current() };
  }

  function put(key, value) { // makes room if the browser has no more
    for (;;) {
      try {
        return localStorage.setItem(key, value);
      } catch (error) {
        const others = saved().filter(({ id }) => PREFIX + id !== key);
        if (!others.length) throw error;
        localStorage.removeItem(PREFIX + others.at(-1).id);
      }
    }
  }

  function save(chat) {
    if (chat?.length) {
      const messages = chat.map(({ role, content }) => ({ role, content: textOf(content) }));
      const [kept, wanted] = [read(current())?.messages ?? null, messages].map(JSON.stringify);
      if (!current() || (kept !== "null" && kept !== known)) { // another tab has gone on with it
        sessionStorage.setItem(CURRENT, `${Date.now()}-${Math.random().toString(36).slice(2)}`);
      }
      if (kept !== wanted) {
        const title = messages[0].content.split("\n")[0].slice(0, 40);
        put(PREFIX + current(), JSON.stringify({ title, time: Date.now(), messages }));
        known = wanted;
      }
      for (const { id } of saved().slice(MAX_CONVERSATIONS)) localStorage.removeItem(PREFIX + id);
    }
    return list();
  }

  function show() { // the current conversation as the Chatbot wants it, and the list
    const messages = read(current())?.messages ?? null;
    if (!messages) sessionStorage.removeItem(CURRENT);
    known = JSON.stringify(messages);
    const shown = (messages ?? []).map(({ role, content }) => (
      { role, metadata: null, options: null, content: [{ type: "text", text: content }] }
    ));
    return [shown, list()];
  }

  function showSidebar(wanted) {
    const sidebar = document.querySelector(".sidebar");
    if (sidebar.classList.contains("open") !== wanted) {
      sidebar.querySelector(".toggle-button").click();
    }
  }

  function load() {
    if (innerWidth >= WIDE) showSidebar(true);
    return show();
  }

  function choose(id) { // at once: before it is opened, a save may put the list back
    chosen = id;
  }

  function open(chat) {
    save(chat);
    sessionStorage.setItem(CURRENT, chosen);
    if (innerWidth < WIDE) showSidebar(false);
    return show();
  }

  function start(chat) {
    save(chat);
    sessionStorage.removeItem(CURRENT);
    if (innerWidth < WIDE) showSidebar(false);
    return show();
  }

  function remove(chat, question) {
    if (!chat?.length || !confirm(question)) return [chat, list()];
    localStorage.removeItem(PREFIX + current());
    sessionStorage.removeItem(CURRENT);
    return show();
  }

  const keepParameters = (...values) => put(SETTINGS, JSON.stringify(values));
  const parameters = (...defaults) => JSON.parse(localStorage.getItem(SETTINGS)) ?? defaults;

  return { load, save, choose, open, start, remove, keepParameters, parameters };
})();
