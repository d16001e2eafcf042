const status = document.querySelector("#status");
const lasting = s => s < 120 ? `${Math.round(s)} s` : s < 7200 ? `${Math.round(s / 60)} min`
  : s < 172800 ? `${(s / 3600).toFixed(1)} h` : `${Math.round(s / 86400)} days`;
for (const time of document.querySelectorAll("time")) {
  const moment = new Date(time.dateTime), today = moment.toDateString() === new Date().toDateString();
  time.title = time.textContent;
  time.textContent = today ? moment.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })
    : moment.toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}
const kept = "wanlora " + location.pathname + location.search;
const scrolled = [...document.querySelectorAll(".strip")], folded = [...document.querySelectorAll("details")];
const place = () => ({ top: scrollY, left: scrolled.map(e => e.scrollLeft), open: folded.map(e => e.open),
  reload: document.querySelector("#reload")?.checked });
const before = (() => { try { return JSON.parse(sessionStorage.getItem(kept)); } catch { return null; } })();
history.scrollRestoration = "manual";
addEventListener("pagehide", () => { try { sessionStorage.setItem(kept, JSON.stringify(place())); } catch {} });
scrolled.forEach((e, i) => { e.scrollLeft = before?.left?.length === scrolled.length ? before.left[i] : e.scrollWidth; });
folded.forEach((e, i) => { if (before?.open?.length === folded.length) e.open = before.open[i]; });
if (before) scrollTo(0, before.top);
if (status) {
  const written = Number(status.dataset.written), age = () => Math.max(0, Date.now() / 1000 - written);
  const live = status.dataset.state === "training", box = document.querySelector("#reload");
  if (box && before?.reload === false) box.checked = false;
  let used = 0;
  for (const kind of ["pointerdown", "pointermove", "wheel", "touchmove", "keydown", "scroll"])
    addEventListener(kind, () => { used = Date.now(); }, { passive: true });
  const idle = () => document.visibilityState === "visible" && Date.now() - used > 3000
    && getSelection().isCollapsed && [...document.querySelectorAll("video")].every(v => v.paused);
  const opened = Date.now(), wait = Math.min(65, Math.max(2, Number(status.dataset.next) + 1 - age()));
  const due = age() > 2 * Number(status.dataset.next) + 10 ? 30 : wait;
  const tick = () => {
    document.querySelector("#age").textContent = ` (${lasting(age())} ago)`;
    if (!live) return;
    const silent = document.querySelector("#silent");
    silent.hidden = age() < SILENT_S;
    if (!silent.hidden) {
      document.querySelector("#left")?.remove();
      Object.assign(document.querySelector("#state"), { textContent: "No sign of life", className: "bad" });
    }
    silent.querySelector("span").textContent = lasting(age());
    if (box.checked && Date.now() - opened > 1000 * due && idle()) location.reload();
  };
  tick();
  setInterval(tick, 1000);
}
