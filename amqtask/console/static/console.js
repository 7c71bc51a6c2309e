// Live pages: whenever the server says that something was taken in, the page's main part is fetched again. Questions before actions.
(() => {
  "use strict";
  const root = document.body.dataset.root;
  const box = document.getElementById("live");
  let source = null, timer = null;
  const isBusy = () => {
    const at = document.activeElement;
    return document.querySelector("main details[open], main [data-still]") || (at && at.closest("main form")) || String(getSelection());
  };
  const refresh = () => {
    timer = null;
    if (!isBusy()) htmx.ajax("GET", location.pathname + location.search, { target: "main", select: "main", swap: "outerHTML" });
  };
  const listen = () => {
    source = new EventSource(root + "/live");
    source.addEventListener("news", () => { timer = timer || setTimeout(refresh, 700); });
  };
  const look = () => {
    if (box.checked && !source) listen();
    if (!box.checked && source) { source.close(); source = null; }
  };
  const kept = localStorage.getItem("amqtask-live");
  if (kept !== null) box.checked = kept === "yes";
  box.addEventListener("change", () => { localStorage.setItem("amqtask-live", box.checked ? "yes" : "no"); look(); });
  document.addEventListener("submit", (event) => {
    const question = event.target.dataset.confirm;
    if (question && !confirm(question)) event.preventDefault();
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
