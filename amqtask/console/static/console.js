// Live pages: whenever the server says that something was taken in, the page's main part is fetched again. Questions before actions.
(() => {
  "use strict";
  const root = document.body.dataset.root;
  const box = document.getElementById("live");
  const trouble = document.getElementById("trouble");
  let source = null, timer = null, shown = new Date();
  // The field of a search has the focus from the beginning: nobody has written anything there yet.
  const isWriting = (at) => at && at.closest("main form") && !(at.autofocus && at.value === at.defaultValue);
  const isBusy = () =>
    document.querySelector("main details[open], main [data-still]") || isWriting(document.activeElement) || String(getSelection());
  const tell = (why) => {
    trouble.hidden = !why;
    trouble.textContent = why ? `This page is as it was at ${shown.toLocaleTimeString()}: ${why}` : "";
  };
  const refresh = () => {
    timer = null;
    if (!isBusy()) htmx.ajax("GET", location.pathname + location.search, { target: "main", select: "main", swap: "outerHTML" });
  };
  const refreshIn = (milliseconds) => { timer = timer || setTimeout(refresh, milliseconds); };
  // What the console answers in place of the page: trying again, as long as this page is live.
  const failed = (why) => {
    tell(why);
    if (source) refreshIn(5000);
  };
  document.body.addEventListener("htmx:beforeSwap", (event) => { if (isBusy()) event.detail.shouldSwap = false; });
  document.body.addEventListener("htmx:afterSwap", () => { shown = new Date(); tell(""); });
  document.body.addEventListener("htmx:sendError", () => failed("the console does not answer."));
  document.body.addEventListener("htmx:responseError", (event) => {
    const answer = new DOMParser().parseFromString(event.detail.xhr.responseText, "text/html").querySelector("main .notice.error");
    failed(answer ? answer.textContent : `the console answers with ${event.detail.xhr.status}.`);
  });
  const listen = () => {
    source = new EventSource(root + "/live");
    let isLost = false;
    source.addEventListener("news", () => refreshIn(700));
    source.addEventListener("trouble", (event) => { isLost = true; tell(JSON.parse(event.data)); });
    source.addEventListener("open", () => { if (isLost) refreshIn(0); isLost = false; });
    source.addEventListener("error", () => {
      isLost = true;
      const isOver = source.readyState === EventSource.CLOSED;
      tell(isOver ? "the console refuses to tell what is new. Reload it, and log in if you are asked to." : "the console does not answer; trying again.");
    });
  };
  // A browser has six connections for a host: tabs that nobody sees let theirs go, else a seventh one would load nothing.
  const look = () => {
    const isWanted = box.checked && !document.hidden;
    if (isWanted && !source) listen();
    if (!isWanted && source) { source.close(); source = null; tell(""); }
  };
  document.addEventListener("visibilitychange", look);
  const kept = localStorage.getItem("amqtask-live");
  if (kept !== null) box.checked = kept === "yes";
  box.addEventListener("change", () => { localStorage.setItem("amqtask-live", box.checked ? "yes" : "no"); look(); });
  document.addEventListener("submit", (event) => {
    const question = event.target.dataset.confirm;
    // A second press of the same button is a slip.
    if (event.target.dataset.isSent || (question && !confirm(question))) event.preventDefault();
    else if (event.target.method === "post") event.target.dataset.isSent = "yes";
  });
  addEventListener("pageshow", () => {
    for (const form of document.querySelectorAll("form[data-is-sent]")) delete form.dataset.isSent;
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !event.target.closest("input, textarea, select")) {
      const field = document.querySelector("input[type=search]");
      event.preventDefault();
      if (field) field.focus(); else location.href = root + "/tasks";
    }
  });
  document.body.addEventListener("htmx:configRequest", (event) => { event.detail.headers["HX-Request"] = "true"; });
  addEventListener("load", look);
})();
