// Keeps the regions marked data-live as the server would render them now.
//
// A region is replaced where its HTML has changed; ticked boxes and the focus stay. The page of a
// job or a sweep looks again when its event stream says so, a list in intervals that grow while nothing changes.
// A page that nobody looks at asks nothing.
const SHORTEST_S = 2;
const LONGEST_S = 20;

const pause = (seconds) => new Promise((resume) => setTimeout(resume, seconds * 1000));

async function visible() {
  while (document.hidden) {
    await new Promise((resume) => document.addEventListener("visibilitychange", resume, { once: true }));
  }
}

export async function refresh(changed) {
  const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
  if (!answer.ok) return false;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  let any = false;
  for (const region of document.querySelectorAll("[data-live]")) {
    const now = fresh.getElementById(region.id);
    if (now && replace(region, now)) any = true;
  }
  if (any) changed();
  return any;
}

function replace(region, now) {
  const ticked = [...region.querySelectorAll("input:checked")].map((box) => box.id);
  const focus = region.contains(document.activeElement) ? document.activeElement.id : null;
  const last = region.dataset.seen ?? region.innerHTML;
  if (last === now.innerHTML) return false;
  region.dataset.seen = now.innerHTML;
  const atEnd = region.scrollTop + region.clientHeight >= region.scrollHeight - 4;
  region.innerHTML = now.innerHTML;
  for (const id of ticked) {
    const box = document.getElementById(id);
    if (box) box.checked = true;
  }
  if (focus) document.getElementById(focus)?.focus();
  if (atEnd) region.scrollTop = region.scrollHeight;
  return true;
}

async function followList(changed) {
  for (let wait = 2 * SHORTEST_S; ; ) {
    await pause(wait);
    await visible();
    const any = await refresh(changed).catch(() => false);
    wait = any ? SHORTEST_S : Math.min(2 * wait, LONGEST_S);
  }
}

function followEvents(address, changed) {
  const stream = new EventSource(address);
  let due = null;
  const soon = () => {
    due ??= setTimeout(async () => {
      await visible();
      due = null;
      await refresh(changed).catch(() => false);
    }, 1000);
  };
  for (const kind of ["state", "stage", "progress", "warning", "cancel_requested", "attempt"]) {
    stream.addEventListener(kind, soon);
  }
  stream.addEventListener("end", () => {
    stream.close();
    soon();
  });
}

export function follow(changed) {
  const source = document.querySelector("[data-events]");
  if (source?.dataset.events) followEvents(source.dataset.events, changed);
  else if (document.querySelector("[data-live=list]")) followList(changed);
}
