/* The live page: the tasks and tags of one flow execution, and the batches that change them.

It reads the state with its revision, then follows the later changes over a WebSocket. After a lost
connection it asks for what follows its last revision, so nothing is missed or shown twice. All that
comes from the API is set as text. The token is kept in memory and in the session storage of the
tabs of this browser that show this page, never in a URL. A tab that is opened without a token gets
it from another tab. */

const STREAM_ROWS = 200; // older rows are dropped, so that a page may stay open for days
const EARLIER_ROWS = 50; // how much of the past a page begins with
const SHOWN_CHANGES = 4; // of one batch; the others are folded away
const SHOWN_TAGS = 600; // rows on the whole page; 6 to 100 of each task
const SHOWN_NAMES = 20; // of the tasks that there are, when one is named that there is not
const SHOWN_METADATA = 120; // characters; what is longer is folded away
const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 10_000;
const REFUSED_WITHIN_MS = 300; // a refusal of the token comes at once; only then show "Live"
const PULSE_MS = 15_000;
const ANSWER_MS = 30_000; // longer than the endpoint itself waits for a result
const ANNOUNCE_MS = 1_500; // changes in between are announced as one
const TOKEN_KEY = "task-tags:token";
const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i;

const page = {
  execution: null,
  task: null, // that a link names
  arriving: false, // until that task has been gone to
  token: null,
  asking: false, // other tabs, for their token
  revision: null, // of what is shown; null until it has been read
  socket: null,
  attempt: 0, // counts attempts to connect: what belongs to an earlier one is dropped
  failures: 0, // in a row
  retryAt: null,
  retryTimer: null,
  today: new Date().toDateString(), // the day that the times are shown for
};
// task name → {node, open, folded, tags: Map of tag id → {node or null, tag}}
const tasks = new Map();
const rows = new Map(); // batch id → {node, event, seenAfter, sent}
const ownBatches = new Set(); // ids of batches that were sent from here
// What the fields of the form suggest.
const options = { "known-tasks": new Set(), "known-types": new Set() };
const unannounced = []; // change events since the last announcement

const byId = (id) => document.getElementById(id);
const find = (node, selector) => node.querySelector(selector);
const copyOf = (id) => byId(id).content.firstElementChild.cloneNode(true);

// --- JSON ----------------------------------------------------------------------------------------

/** Parse JSON so that it can be sent back unchanged: JavaScript would round large integers. */
function parseExactly(text) {
  if (!JSON.rawJSON || !/\d{16}/.test(text)) return JSON.parse(text);
  return JSON.parse(text, (_, value, { source }) =>
    Number.isInteger(value) && !Number.isSafeInteger(value) && /^-?\d+$/.test(source)
      ? JSON.rawJSON(source)
      : value,
  );
}

// --- Asking the endpoint -------------------------------------------------------------------------

/** What the endpoint answered instead of what was asked for; status 0 if there was no answer. */
class Refusal extends Error {
  constructor(status, message, { details = [], retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.details = details;
    this.retryAfter = retryAfter;
  }
}

const NO_ANSWER = "The endpoint does not answer.";

async function ask(path, { method = "GET", query = {}, headers = {}, body } = {}) {
  const url = new URL(path, document.baseURI);
  for (const [name, value] of Object.entries(query)) url.searchParams.set(name, value);
  let response, text;
  try {
    response = await fetch(url, {
      method,
      headers: { Authorization: `Bearer ${page.token}`, ...headers },
      body,
      cache: "no-store",
      signal: AbortSignal.timeout(ANSWER_MS),
    });
    text = await response.text();
  } catch {
    throw new Refusal(0, NO_ANSWER);
  }
  if (!response.ok) throw refusalOf(response, text);
  try {
    return { response, body: parseExactly(text) };
  } catch {
    throw new Refusal(0, "The answer is not JSON: is this the address of the endpoint?");
  }
}

function refusalOf(response, text) {
  const retryAfter = response.headers.get("Retry-After");
  try {
    const { error } = JSON.parse(text);
    return new Refusal(response.status, error.message, { details: error.details, retryAfter });
  } catch {
    // Something between us and the endpoint answered.
    return new Refusal(
      response.status,
      `the answer was ${response.status} ${response.statusText}`,
      { retryAfter },
    );
  }
}

const ofExecution = (more = {}) => ({ flow_execution_id: page.execution, ...more });

// --- Following -----------------------------------------------------------------------------------

/** Connect, or connect again: read the state unless it is known, then follow its changes. */
async function connect() {
  const attempt = leaveConnection();
  if (page.failures === 0) showConnection("connecting", "Connecting…");
  else byId("countdown").textContent = "trying now…";
  try {
    if (page.revision === null) await readEverything(attempt);
    if (attempt === page.attempt) openSocket(attempt);
  } catch (refusal) {
    if (attempt === page.attempt) onRefusal(refusal);
  }
}

/** Let go of the connection and of whatever is under way; return the number of the next attempt. */
function leaveConnection() {
  page.attempt += 1;
  clearTimeout(page.retryTimer);
  page.retryAt = null;
  page.socket?.close();
  page.socket = null;
  return page.attempt;
}

async function readEverything(attempt) {
  // Later pages may be of later revisions: then changes are applied twice, which does no harm.
  const { response } = await ask("task-tags", { query: ofExecution({ limit: 1 }) });
  const revision = Number(response.headers.get("ETag").match(/\d+/)[0]);
  const read = await readPages("task-executions", ofExecution({ limit: 1000 }), "task_executions");
  for (const task of read) {
    if (!task.tags_next) continue;
    const rest = Object.fromEntries(new URL(task.tags_next, document.baseURI).searchParams);
    task.tags.push(...(await readPages("task-tags", { ...rest, limit: 1000 }, "tags")));
  }
  const earlier = rows.size === 0 ? await readEarlier(revision) : { events: [], note: "" };
  if (attempt !== page.attempt) return;
  page.revision = revision;
  showTasks(read);
  for (const event of earlier.events) showEvent(event);
  if (earlier.note) byId("stream-end").textContent = earlier.note;
  showCounts();
  goToTask();
}

/** Read all pages from one on; `field` has what is on a page. */
async function readPages(path, query, field) {
  const found = [];
  for (let next = query.page; next !== null;) {
    const { body } = await ask(path, {
      query: next === undefined ? query : { ...query, page: next },
    });
    found.push(...body[field]);
    next = body.next_page;
  }
  return found;
}

/** Read the last changes up to a revision, to begin the stream with. */
async function readEarlier(revision) {
  const first = Math.max(0, revision - EARLIER_ROWS);
  const events = [];
  try {
    for (let after = first; after < revision; after = events.at(-1).revision) {
      const query = ofExecution({ after, limit: revision - after });
      const { body } = await ask("task-tags/changes", { query });
      if (body.length === 0) break;
      events.push(...body);
    }
  } catch (refusal) {
    if (refusal.status !== 410) throw refusal;
    return { events, note: "Earlier batches are no longer stored." };
  }
  return { events, note: first > 0 ? "Earlier batches are not shown." : "" };
}

function openSocket(attempt) {
  const url = new URL("task-tags/changes", document.baseURI);
  url.protocol = url.protocol.replace("http", "ws");
  for (const [name, value] of Object.entries(ofExecution({ after: page.revision })))
    url.searchParams.set(name, value);
  const socket = new WebSocket(url);
  page.socket = socket;
  let error = null;
  socket.addEventListener("open", () => {
    socket.send(JSON.stringify({ token: page.token }));
    setTimeout(() => {
      if (attempt === page.attempt && socket.readyState === WebSocket.OPEN) onLive();
    }, REFUSED_WITHIN_MS);
  });
  socket.addEventListener("message", ({ data }) => {
    if (attempt !== page.attempt) return;
    const frame = parseExactly(data);
    if (frame.error) error = frame.error;
    else onEvent(frame);
  });
  socket.addEventListener("close", ({ code }) => {
    if (attempt === page.attempt) onClosed(code, error?.message);
  });
}

function onEvent(event) {
  onLive();
  if (event.revision <= page.revision) return;
  if (event.revision > page.revision + 1) {
    // The endpoint promises that this can't happen; if it does, what is shown must still be right.
    readAnew(
      `Revisions ${page.revision + 1} to ${event.revision - 1} were not received: ` +
        "reading everything again.",
    );
    return;
  }
  page.revision = event.revision;
  for (const change of event.changes) applyChange(change);
  showEvent(event, Date.now());
  showCounts();
  announceLater(event);
}

/** Read the state again, as changes in between are not to be had; say so in the stream. */
function readAnew(why) {
  addToStream(noteOf(why));
  page.revision = null;
  retryLater(why);
}

function onLive() {
  page.failures = 0;
  if (byId("connection").dataset.state !== "live") showConnection("live", "Live");
}

/** Handle a refused request: retry if the cause may be temporary, otherwise stop. */
function onRefusal({ status, message }) {
  if (status === 401) askForToken(`The token was refused: ${sentence(message)}`);
  else if (status === 403) stop(`Not allowed: ${sentence(message)}`);
  else if (status === 404) stop(UNKNOWN_EXECUTION);
  else if (status === 0) retryLater(message);
  else if (passes(status)) retryLater(`The endpoint is not available now: ${sentence(message)}`);
  else stop(`The endpoint refused the request: ${sentence(message)}`);
}

/** Whether a retry may succeed. After 410 (changes were purged), everything is read again. */
function passes(status) {
  return status === 0 || status >= 500 || [408, 410, 429].includes(status);
}

const UNKNOWN_EXECUTION =
  "There is no such execution here: it is not registered, or it belongs to another organization.";

/** What a close without an error frame means: the codes of RFC 6455, and those registered later. */
const CLOSED = {
  1000: "The endpoint ended the connection.",
  1001: "The endpoint was stopped.",
  1006: NO_ANSWER, // no closing handshake: a lost connection, or none at all
  1011: "The endpoint met a fault of its own.",
  1012: "The endpoint is being restarted.",
  1013: "The endpoint has too much to do.",
  1014: "The proxy got no answer from the endpoint.",
};

function onClosed(code, message) {
  const refused = { 4400: 400, 4401: 401, 4403: 403, 4404: 404, 1009: 400 }[code];
  if (code === 4410) readAnew("Earlier changes are no longer stored: reading everything again.");
  else if (refused) onRefusal({ status: refused, message: message ?? "it gave no reason" });
  else if (message) retryLater(`The endpoint ended the connection: ${sentence(message)}`);
  else retryLater(CLOSED[code] ?? `The endpoint ended the connection, with the code ${code}.`);
}

function retryLater(why) {
  leaveConnection();
  const most = Math.min(LONGEST_WAIT_MS, FIRST_WAIT_MS * 2 ** page.failures);
  // Random, so that many pages do not return at the same moment.
  const wait = most * (0.5 + Math.random() / 2);
  page.failures += 1;
  page.retryAt = Date.now() + wait;
  page.retryTimer = setTimeout(connect, wait);
  showConnection("waiting", "Not connected");
  showNotice(`${why} ${timeShown()}`);
  countDown();
}

function stop(why) {
  leaveConnection();
  showConnection("stopped", "Not connected");
  showNotice(`${why} ${timeShown()}`, { words: "Try again", run: readFromTheStart });
}

function askForToken(why) {
  leaveConnection();
  forgetToken();
  showConnection("stopped", "Not connected");
  if (page.revision === null) {
    hide(byId("notice"));
    openForm(why);
  } else
    showNotice(`${why} ${timeShown()}`, { words: "Give another token", run: () => openForm(why) });
}

function readFromTheStart() {
  page.revision = null;
  page.failures = 0;
  connect();
}

function reconnectNow() {
  if (page.retryAt !== null) connect();
}

/** In a tab that was not looked at, timers stand still. */
function onSeen() {
  refreshTimes();
  reconnectNow();
}

/** Check for changes that were not received: a connection may be lost without an event. */
async function checkConnection() {
  if (byId("connection").dataset.state !== "live") return;
  const { attempt, revision } = page;
  try {
    const { body } = await ask("task-tags/changes", {
      query: ofExecution({ after: revision, limit: 1 }),
    });
    if (body.length === 0) return;
    await new Promise((resolve) => setTimeout(resolve, 2_000)); // it may just be on its way
    if (attempt === page.attempt && revision === page.revision)
      retryLater("The connection stopped delivering changes.");
  } catch (refusal) {
    if (attempt === page.attempt) onRefusal(refusal);
  }
}

// --- Tasks and tags ------------------------------------------------------------------------------

/** Show a state that was read. Nodes of what stays are kept, and with them the focus. */
function showTasks(read) {
  const names = new Set(read.map((task) => task.task_name));
  for (const name of [...tasks.keys()]) if (!names.has(name)) dropTask(name);
  for (const task of read) {
    showState(task);
    const shown = taskOf(task.task_name);
    const ids = new Set(task.tags.map((tag) => tag.id));
    for (const { tag } of [...shown.tags.values()]) if (!ids.has(tag.id)) dropTag(tag);
    for (const tag of task.tags) keepTag(tag);
  }
  for (const task of tasks.values()) renderRows(task);
}

function applyChange({ change, tag, task }) {
  if (change === "added") {
    keepTag(tag);
    renderRows(taskOf(tag.task_name));
    flash(taskOf(tag.task_name).tags.get(tag.id).node);
  } else if (change === "removed") dropTag(tag);
  else if (change === "state") flash(showState(task));
}

function taskOf(name) {
  if (!tasks.has(name)) {
    const node = copyOf("task-template");
    find(node, ".task-name bdi").textContent = name;
    find(node, ".tags").setAttribute("aria-label", `Tags of ${name}`);
    let next;
    for (const other of tasks.keys()) if (other > name && !(other > next)) next = other;
    byId("tasks").insertBefore(node, next === undefined ? null : tasks.get(next).node);
    const task = { node, open: false, folded: 0, tags: new Map() };
    find(node, ".earlier").addEventListener("click", () => unfold(task));
    tasks.set(name, task);
    if (name === page.task) byId("task-problem").hidden = true;
    addOption("known-tasks", name);
  }
  return tasks.get(name);
}

function showState({ task_name, state, state_changed_at, state_changed_by }) {
  const { node } = taskOf(task_name);
  const badge = find(node, ".state");
  badge.textContent = state ?? "no state";
  badge.dataset.state = state ?? "none";
  const by = find(node, ".state-by");
  by.replaceChildren();
  if (state) by.append("by ", isolated(state_changed_by), ", ", timeOf(state_changed_at));
  return node.firstElementChild;
}

function keepTag(tag) {
  const { tags } = taskOf(tag.task_name);
  if (tags.has(tag.id)) return;
  tags.set(tag.id, { node: null, tag });
  addOption("known-types", tag.tag_type);
}

/** Give each tag a row. Of very many tags, only the last have one; a button shows the others. */
function renderRows(task) {
  const entries = [...task.tags.values()];
  const most = task.open
    ? Infinity
    : Math.max(6, Math.min(100, Math.floor(SHOWN_TAGS / tasks.size)));
  const rows = entries.length - task.folded;
  if (rows > most || rows === 0) task.folded = Math.max(0, entries.length - Math.ceil(most / 2));
  const button = find(task.node, ".earlier");
  button.hidden = task.folded === 0;
  button.textContent = `Show ${count(task.folded, "earlier tag")}`;
  for (const entry of entries.slice(0, task.folded)) foldAway(entry, button);
  const list = find(task.node, ".tags");
  let next = null;
  for (const entry of entries.slice(task.folded).reverse()) {
    if (!entry.node) list.insertBefore((entry.node = rowOf(entry.tag)), next);
    else if (entry.tag.tag === PENDING) nameRemove(entry.node, entry.tag); // it may be alone
    next = entry.node;
  }
  find(task.node, ".no-tags").hidden = entries.length > 0;
}

function foldAway(entry, button) {
  if (!entry.node) return;
  moveFocus(entry.node, button);
  entry.node.remove();
  entry.node = null;
}

function unfold(task) {
  task.open = true;
  task.folded = 0;
  renderRows(task);
  find(task.node, ".tag").focus();
}

function rowOf(tag) {
  const node = copyOf("tag-template");
  fillChip(find(node, ".chip"), tag);
  find(node, ".metadata").append(...metadataOf(tag));
  find(node, ".by-who").textContent = tag.created_by;
  find(node, "time").replaceWith(timeOf(tag.created_at));
  nameRemove(node, tag);
  find(node, ".remove").addEventListener("click", () => askToRemove(tag, node));
  return node;
}

/** Say what the × of a row asks, unless the question is open. */
function nameRemove(node, tag) {
  const what = isUndecided(tag) ? "Decide on, or remove," : "Remove";
  find(node, ".remove")?.setAttribute("aria-label", `${what} ${nameOf(tag)} from ${tag.task_name}`);
}

function dropTag({ id, task_name }) {
  const task = taskOf(task_name);
  const { node } = task.tags.get(id) ?? {};
  if (node === undefined) return;
  if (node) {
    // Not to the next ×: who presses Enter once more would ask to remove what they did not mean.
    moveFocus(
      node,
      node.nextElementSibling ?? node.previousElementSibling ?? find(task.node, ".task-name"),
    );
    node.remove();
  } else task.folded -= 1;
  task.tags.delete(id);
  renderRows(task);
}

/** Go to the task that the link names. */
function goToTask() {
  if (!page.arriving) return;
  page.arriving = false;
  const missing = !tasks.has(page.task);
  byId("task-problem").hidden = !missing;
  if (missing)
    byId("task-problem").textContent =
      `There is no task ${quoted(page.task)} here. ${knownTasks()}`;
  else find(tasks.get(page.task).node, ".task-name").focus();
}

/** Say which names of tasks would be right. */
function knownTasks() {
  const names = [...tasks.keys()].sort();
  if (names.length === 0) return "It has no tasks yet.";
  const more =
    names.length > SHOWN_NAMES ? ` and ${count(names.length - SHOWN_NAMES, "other")}` : "";
  return `Its tasks are ${names.slice(0, SHOWN_NAMES).map(quoted).join(", ")}${more}.`;
}

function dropTask(name) {
  const { node } = tasks.get(name);
  moveFocus(node, byId("tasks-title"));
  node.remove();
  tasks.delete(name);
}

/** Keep the place of a keyboard user when the focused element is removed. */
function moveFocus(from, to) {
  if (from.contains(document.activeElement)) to.focus();
}

function nameOf({ tag_type, tag, tag_metadata }) {
  const metadata = tag_metadata === null ? "" : ` ${JSON.stringify(tag_metadata)}`;
  return `${tag_type}: ${tag}${metadata.length > SHOWN_METADATA ? " with metadata" : metadata}`;
}

const VERDICTS = {
  good: ["accepted", "approved", "ok", "passed", "succeeded", "valid", "verified"],
  bad: ["declined", "denied", "error", "failed", "invalid", "refused", "rejected"],
};

/** Whether a tag says yes or no, which a colour and a sign show, whatever its type. */
function verdictOf(tag) {
  return (
    Object.keys(VERDICTS).find((verdict) => VERDICTS[verdict].includes(tag.toLowerCase())) ?? ""
  );
}

function fillChip(chip, { tag_type, tag }) {
  chip.dataset.hue = hueOf(tag_type);
  chip.dataset.verdict = verdictOf(tag);
  find(chip, ".chip-type").textContent = tag_type;
  find(chip, ".chip-tag").textContent = tag;
}

/** One of six colours for each type, the same on every page. The colours have no meaning. */
function hueOf(type) {
  let sum = 0;
  for (const character of type) sum = (sum * 33 + character.codePointAt(0)) % 9973;
  return sum % 6;
}

function metadataOf({ tag_metadata }) {
  if (tag_metadata === null) return [];
  const text = JSON.stringify(tag_metadata);
  if (text.length <= SHOWN_METADATA) return [textNode("code", text)];
  const fold = folded(`metadata, ${text.length.toLocaleString()} characters`, () =>
    textNode("code", text),
  );
  fold.firstElementChild.tabIndex = -1; // the arrow keys lead to it
  return [fold];
}

function addOption(list, value) {
  if (options[list].has(value)) return;
  options[list].add(value);
  const option = document.createElement("option");
  option.value = value;
  byId(list).append(option);
}

function showCounts() {
  let tags = 0;
  for (const task of tasks.values()) tags += task.tags.size;
  byId("counts").textContent = [
    count(tasks.size, "task"),
    count(tags, "tag"),
    `revision ${page.revision}`,
  ].join(" · ");
  byId("execution").dataset.read = "yes";
  byId("no-tasks").hidden = tasks.size > 0;
  byId("no-batches").hidden = rows.size > 0;
  byId("stream-end").hidden = byId("stream-end").textContent === "";
  ensureTabStop();
}

// --- One tab stop for all tags -------------------------------------------------------------------

/** The arrow keys lead from one to the next. */
const STOPS = '#execution[data-writes="yes"] .remove, .metadata summary';

function tabStopOf(node) {
  if (node.matches(STOPS)) return node;
  return node.matches(".tag") ? find(node, STOPS) : null;
}

function setTabStop(stop) {
  for (const old of byId("tasks").querySelectorAll('[tabindex="0"]')) old.tabIndex = -1;
  stop.tabIndex = 0;
}

/** There must always be one. */
function ensureTabStop() {
  if (byId("tasks").querySelector('[tabindex="0"]')?.matches(STOPS)) return;
  const first = byId("tasks").querySelector(STOPS);
  if (first) setTabStop(first);
}

function onArrow(event) {
  const { key, target } = event;
  const here = tabStopOf(target);
  if (!here || !["ArrowDown", "ArrowUp", "Home", "End"].includes(key)) return;
  event.preventDefault();
  const stops = [...byId("tasks").querySelectorAll(STOPS)];
  const place = stops.indexOf(here) + { ArrowDown: target === here ? 1 : 0, ArrowUp: -1 }[key];
  (key === "Home" ? stops[0] : key === "End" ? stops.at(-1) : stops[place])?.focus();
}

// --- The stream of batches -----------------------------------------------------------------------

/** Show a change event as the newest row. `seenAt`: when it came; undefined for past events. */
function showEvent(event, seenAt = null) {
  const row = rows.get(event.batch_id) ?? newRow(event.batch_id);
  row.event = event;
  row.seenAfter = seenAt === null ? null : seenAt - Date.parse(event.changed_at);
  fillRow(row);
  addToStream(row.node); // also if it exists already: rows are in the order of revisions
}

/** Show the result of a batch that was sent from here: its statuses, and its latency. */
function showSent(batchId, sent) {
  ownBatches.add(batchId);
  const row = rows.get(batchId) ?? newRow(batchId);
  row.sent = { ...row.sent, ...sent };
  fillRow(row);
  if (!row.node.isConnected) addToStream(row.node);
  showCounts();
}

function newRow(batchId) {
  const row = { node: copyOf("batch-template"), event: null, sent: null, seenAfter: null };
  const id = find(row.node, ".batch-id");
  id.textContent = `…${batchId.slice(-8)}`; // a UUIDv7 begins with the time, which hardly differs
  id.title = `batch ${batchId}`;
  row.node.dataset.batch = batchId;
  rows.set(batchId, row);
  return row;
}

function addToStream(node) {
  byId("stream").prepend(node);
  while (byId("stream").children.length > STREAM_ROWS) {
    const last = byId("stream").lastElementChild;
    rows.delete(last.dataset.batch);
    last.remove();
    byId("stream-end").textContent = "Earlier batches are not shown.";
  }
}

function noteOf(words) {
  const node = textNode("li", words);
  node.className = "batch note";
  return node;
}

function fillRow({ node, event, sent, seenAfter }) {
  const changes = event?.changes ?? [];
  if (event) node.dataset.revision = event.revision;
  find(node, ".revision").textContent = event ? `#${event.revision}` : "–";
  find(node, ".batch-who").textContent = event?.changed_by ?? actorOf(page.token)?.sub ?? "you";
  find(node, ".batch-counts").textContent = sent?.statuses ? "" : countsOf(changes);
  find(node, "time").replaceWith(timeOf(event?.changed_at ?? sent.at, "quiet"));
  const asked = sent && { change: sent.operation.operation, tag: sent.operation };
  const lines = event ? changes : [asked]; // what has no effect is shown as it was asked for
  const list = find(node, ".changes");
  list.replaceChildren(...lines.slice(0, SHOWN_CHANGES).map(lineOf));
  if (lines.length > SHOWN_CHANGES) list.append(restOf(lines.slice(SHOWN_CHANGES)));
  find(node, ".statuses").replaceChildren(...(sent?.statuses ?? []).map(statusOf));
  find(node, ".latency").textContent = latencyOf(sent, seenAfter);
}

function restOf(lines) {
  const item = document.createElement("li");
  item.append(
    folded(`and ${lines.length} more`, () => {
      const list = document.createElement("ul");
      list.append(...lines.map(lineOf));
      return list;
    }),
  );
  return item;
}

function lineOf({ change, tag, task }) {
  const node = copyOf("change-template");
  const sign = find(node, ".sign");
  node.dataset.change = change;
  sign.textContent =
    { added: "+", removed: "−", state: "→", add: "+", remove: "−", set: "=" }[change] ?? "?";
  sign.setAttribute("role", "img");
  sign.setAttribute("aria-label", change);
  find(node, ".change-task").textContent = (tag ?? task)?.task_name ?? "";
  const what = find(node, ".change-what");
  if (tag) {
    const chip = find(byId("tag-template").content, ".chip").cloneNode(true);
    fillChip(chip, tag);
    what.append(chip);
    const metadata = JSON.stringify(tag.tag_metadata ?? null);
    if (metadata !== "null")
      what.append(
        " ",
        textNode("code", metadata.length > 60 ? `${metadata.slice(0, 60)}…` : metadata),
      );
  } else if (task) {
    const badge = textNode("span", task.state ?? "no state");
    badge.className = "state";
    badge.dataset.state = task.state ?? "none";
    what.append(badge);
  }
  return node;
}

function statusOf(status) {
  const node = textNode("span", status.replaceAll("_", " "));
  node.className = "status";
  node.dataset.status = status;
  return node;
}

/** Of our batch: until its answer. Of others: until they were seen here, if both clocks agree. */
function latencyOf(sent, seenAfter) {
  if (sent?.gaveUp) return "no result yet: the batch is still in the inbox, or was refused";
  if (sent?.waiting) return "accepted, waiting for its result…";
  if (sent)
    return `answered in ${duration(sent.latency)}${sent.problem ? `: ${sent.problem}` : ""}`;
  if (seenAfter === null) return "";
  return `seen after ${seenAfter < 0 ? "–" : duration(seenAfter)}`;
}

function countsOf(changes) {
  const counts = {};
  for (const { change } of changes) counts[change] = (counts[change] ?? 0) + 1;
  return wordsOfCounts(counts);
}

function wordsOfCounts({ added = 0, removed = 0, state = 0 }) {
  const words = [];
  if (added) words.push(`${added} added`);
  if (removed) words.push(`${removed} removed`);
  if (state) words.push(count(state, "state"));
  return words.join(", ");
}

// --- Changing tags by hand -----------------------------------------------------------------------

/**
 * Send one operation, with conditions if there are any. `place` is where a problem is shown;
 * `onDone` gets the status and the milliseconds.
 */
async function change(operation, place, onDone, conditions = [], key = newKey()) {
  hideProblem(place);
  const here = (named) => ({ ...named, flow_execution_id: page.execution });
  const body = JSON.stringify({ tags: [here(operation)], conditions: conditions.map(here) });
  const headers = { "Content-Type": "application/json", "Idempotency-Key": key };
  const sentAt = performance.now();
  const sent = { operation, at: new Date().toISOString() };
  try {
    const { response, body: answer } = await ask("task-tags", { method: "PATCH", headers, body });
    const latency = performance.now() - sentAt;
    const batchId = response.headers.get("Location").split("/").at(-1);
    if (response.status === 202) {
      showSent(batchId, { ...sent, waiting: true });
      awaitResult(batchId, sentAt, operation);
      onDone("accepted", latency);
    } else {
      const statuses = answer.tags.map(({ status }) => status);
      showSent(batchId, { ...sent, statuses, latency });
      onDone(statuses[0], latency);
    }
  } catch (refusal) {
    if (!(refusal instanceof Refusal)) throw refusal;
    // The same key makes it the same batch, so it can't take effect twice.
    const again = () => change(operation, place, onDone, conditions, key);
    showProblem(place, explained(refusal, operation), passes(refusal.status) ? again : null);
  }
}

/**
 * Put into words what only this page knows: which tasks there are, if the endpoint says that one is
 * unknown, and who decided, if a decision came too late.
 */
function explained(refusal, { task_name }) {
  if (refusal.status === 412) {
    const found = refusal.details.flatMap(({ found }) => found ?? []);
    const details = found.map(({ tag, created_by }) => ({
      message: `${quoted(tag)} by ${created_by}`,
    }));
    return new Refusal(412, "it is no longer pending", { details });
  }
  const wrong =
    refusal.status === 404 && refusal.details.some(({ field }) => field === "task_name");
  if (!wrong) return refusal;
  const details = [{ field: "task_name", message: knownTasks() }];
  return new Refusal(404, `there is no task ${quoted(task_name)} here`, { details });
}

/** Ask for the stored result of a batch that was accepted but not applied in time. */
async function awaitResult(batchId, sentAt, operation) {
  for (let wait = 1_000; wait < 60_000; wait *= 1.5) {
    await new Promise((resolve) => setTimeout(resolve, wait));
    let record;
    try {
      record = (await ask(`task-tags/batches/${batchId}`)).body;
    } catch {
      continue; // not yet, or the endpoint is away
    }
    const { tags, error } = record;
    const statuses = error ? [error.code] : tags.map(({ status }) => status);
    const problem = error && problemOf(error, operation);
    showSent(batchId, { waiting: false, statuses, problem, latency: performance.now() - sentAt });
    if (error) byId("announcer").textContent = `Not applied: ${problem}`;
    return;
  }
  showSent(batchId, { gaveUp: true });
}

/** Put a stored error into one line. */
function problemOf({ code, message, details }, operation) {
  const refusal = new Refusal({ not_found: 404, precondition_failed: 412 }[code], message, {
    details,
  });
  const shown = explained(refusal, operation);
  return [shown.message, ...shown.details.map(wordsOfDetail)].join("; ");
}

/** A name for one batch; crypto.randomUUID is there on https and localhost alone. */
function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return `page-${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}

async function addTag(event) {
  event.preventDefault();
  const form = byId("add-form");
  const button = find(form, "button");
  if (button.getAttribute("aria-disabled")) return;
  const { task_name, tag_type, tag, tag_metadata } = Object.fromEntries(new FormData(form));
  const operation = { operation: "add", task_name, tag_type, tag };
  byId("add-said").textContent = "";
  markFields([]);
  try {
    if (tag_metadata.trim()) operation.tag_metadata = parseExactly(tag_metadata);
  } catch (error) {
    const details = [{ field: "tag_metadata", message: `must be JSON (${error.message})` }];
    showProblem(byId("add-problem"), new Refusal(400, "the metadata can’t be read", { details }));
    byId("metadata-field").focus();
    return;
  }
  button.setAttribute("aria-disabled", "true");
  await change(operation, byId("add-problem"), onAdded);
  button.removeAttribute("aria-disabled");
}

function onAdded(status, latency) {
  byId("add-said").textContent = `${wordsOf(status)} (${duration(latency)})`;
  if (status !== "added") return;
  // The next tag is often of the same task and type.
  byId("tag-field").value = byId("metadata-field").value = "";
  if (byId("add-form").contains(document.activeElement)) byId("tag-field").focus();
}

function wordsOf(status) {
  const words = {
    added: "Added",
    replaced: "Decided",
    already_exists: "The tag already exists",
    removed: "Removed",
    not_found: "The tag was already removed",
    accepted: "Accepted: the result will appear in the list of batches",
  };
  return words[status] ?? status;
}

/** Ask first. "Keep" gets the focus and the place of the ×: a second click removes nothing. */
function askToRemove(tag, node) {
  const question = document.createElement("span");
  question.className = "sure";
  question.setAttribute("role", "group");
  question.setAttribute("aria-label", `Remove ${nameOf(tag)} from ${tag.task_name}?`);
  const button = find(node, ".remove");
  const keep = () => {
    question.replaceWith(button);
    nameRemove(node, tag);
    find(node, ".problem")?.remove();
    button.focus();
  };
  const [yes, no] = [buttonFor("Remove", () => removeTag(tag, node, yes)), buttonFor("Keep", keep)];
  yes.classList.add("danger");
  if (isUndecided(tag))
    question.append(...DECISIONS.map((decision) => decisionButton(tag, node, decision)));
  question.append(yes, no);
  question.addEventListener("keydown", ({ key }) => key === "Escape" && keep());
  button.replaceWith(question);
  no.focus();
}

const PENDING = "pending";
const DECISIONS = ["approved", "rejected"];

/** A decision removes all tags of its type, so it is offered if there is only the pending one. */
function isUndecided({ task_name, tag_type, tag }) {
  const ofType = ({ tag: other }) => other.tag_type === tag_type;
  return tag === PENDING && [...taskOf(task_name).tags.values()].filter(ofType).length === 1;
}

/** A decision replaces the pending tag if it is still there, so only the first one counts. */
function decisionButton(tag, node, decision) {
  const { task_name, tag_type } = tag;
  const words = { approved: "Approve", rejected: "Reject" };
  const button = buttonFor(words[decision], async () => {
    if (button.getAttribute("aria-disabled")) return;
    const place = find(node, ".problem") ?? node.appendChild(problemPlace());
    if (!isUndecided(tag)) {
      showProblem(
        place,
        new Refusal(409, `there are other tags of the type ${quoted(tag_type)} now`),
      );
      return;
    }
    button.setAttribute("aria-disabled", "true");
    const condition = { task_name, tag_type, tag: PENDING, exists: true };
    await change(
      { operation: "set", task_name, tag_type, tag: decision },
      place,
      (status) => {
        byId("announcer").textContent = wordsOf(status);
      },
      [condition],
    );
    button.removeAttribute("aria-disabled");
  });
  return button;
}

async function removeTag({ task_name, tag_type, tag, tag_metadata }, node, button) {
  if (button.getAttribute("aria-disabled")) return;
  // Disabled for real, it would lose the focus.
  button.setAttribute("aria-disabled", "true");
  const place = find(node, ".problem") ?? node.appendChild(problemPlace());
  // With the metadata, also if that is null: else every tag of this name would go.
  await change({ operation: "remove", task_name, tag_type, tag, tag_metadata }, place, (status) => {
    byId("announcer").textContent = wordsOf(status);
  });
  button.removeAttribute("aria-disabled");
}

// --- Problems ------------------------------------------------------------------------------------

const PROBLEMS = {
  0: "No answer",
  400: "Not valid",
  401: "The token was refused",
  403: "Not allowed",
  404: "Not found",
  409: "Conflict",
  412: "Decided already",
  429: "Not accepted",
  503: "Not available now",
};

function problemPlace() {
  const place = document.createElement("div");
  place.className = "problem";
  place.setAttribute("role", "alert");
  return place;
}

function hideProblem(place) {
  hide(place, place.id === "add-problem" ? byId("tag-field") : place.closest(".tag"));
  place.replaceChildren();
}

const wordsOfDetail = ({ field, message }) => (field ? `${field}: ${message}` : message);

/** Show an error with all details, and offer to send the request again where that may help. */
function showProblem(place, { status, message, details, retryAfter }, again = null) {
  const words = document.createElement("p");
  words.append(
    textNode("strong", PROBLEMS[status] ?? `Failed (${status})`),
    `: ${sentence(message)}`,
  );
  if (retryAfter) words.append(` Try again in ${retryAfter} s.`);
  if (status === 0) words.append(" It may or may not have been applied; sending it again is safe.");
  const list = document.createElement("ul");
  list.append(...details.map((detail) => textNode("li", wordsOfDetail(detail))));
  place.replaceChildren(words, ...(details.length ? [list] : []));
  if (!place.isConnected) showNotice(place.textContent); // its tag has gone meanwhile
  if (again) place.append(buttonFor("Send again", again));
  if (status === 401) place.append(buttonFor("Give another token", () => openForm("")));
  place.hidden = false;
  if (place.id === "add-problem") markFields(details.map(({ field }) => field));
}

/** Mark the fields of the form that the details name. */
function markFields(names) {
  for (const input of byId("add-form").querySelectorAll("input")) {
    input.ariaInvalid = names.includes(input.name) ? "true" : null;
  }
}

// --- Connection state and announcements ----------------------------------------------------------

function showConnection(state, words) {
  byId("connection").dataset.state = state;
  const shown = byId("connection-state");
  // A screen reader would read it out at each attempt.
  if (shown.textContent !== words) shown.textContent = words;
  byId("countdown").textContent = "";
  if (state === "waiting") byId("reconnect").hidden = false;
  else hide(byId("reconnect"));
  if (state === "live" || state === "connecting") hide(byId("notice"));
}

function hide(node, next = byId("execution-title")) {
  moveFocus(node, next);
  node.hidden = true;
}

function showNotice(words, action = null) {
  const shown = byId("notice-words");
  if (shown.textContent !== words) shown.textContent = words;
  const button = byId("notice-action");
  button.hidden = action === null;
  button.textContent = action?.words ?? "";
  button.onclick = action?.run ?? null;
  byId("notice").hidden = false;
}

function timeShown() {
  return page.revision === null ? "" : `What you see is as of revision ${page.revision}.`;
}

function countDown() {
  if (page.retryAt === null) return;
  const seconds = Math.max(1, Math.ceil((page.retryAt - Date.now()) / 1000));
  byId("countdown").textContent = `trying again in ${seconds} s`;
}

/** Sum up what others changed; each row by itself would drown a screen reader. */
function announceLater(event) {
  if (unannounced.length === 0) setTimeout(announce, ANNOUNCE_MS);
  unannounced.push(event);
}

function announce() {
  const others = unannounced.splice(0).filter(({ batch_id }) => !ownBatches.has(batch_id));
  if (others.length === 0) return;
  const names = [...new Set(others.map(({ changed_by }) => changed_by))];
  const who = names.length > 3 ? `${names.length} actors` : names.join(", ");
  const what = countsOf(others.flatMap(({ changes }) => changes));
  byId("announcer").textContent = `${count(others.length, "batch", "batches")} by ${who}: ${what}`;
}

// --- Opening and forgetting ----------------------------------------------------------------------

/** Take execution, task and token from the fragment. The token leaves the address bar at once. */
function readFragment() {
  const given = new URLSearchParams(location.hash.slice(1));
  const token = given.get("token");
  if (token !== null) {
    given.delete("token");
    history.replaceState(null, "", `#${given}`);
  }
  return { execution: given.get("execution"), task: given.get("task") || null, token };
}

/** Show what the address bar says: at first, and after Back, Forward or a link. */
function begin() {
  const { execution, task, token } = readFragment();
  if (token) rememberToken(cleaned(token));
  else page.token ??= sessionStorage.getItem(TOKEN_KEY);
  if (execution && page.token) openExecution(execution, task);
  else {
    if (execution?.toLowerCase() !== page.execution) leaveExecution();
    openForm("", execution);
  }
}

function openExecution(execution, task = null) {
  const problem = problemWith(execution, page.token);
  if (problem) {
    openForm(problem, execution);
    return;
  }
  const same = execution.toLowerCase() === page.execution;
  if (!same) {
    forgetState();
    // A phone shows the tasks first.
    byId("adding").open = !matchMedia("(max-width: 40rem)").matches;
  }
  page.execution = execution.toLowerCase();
  page.task = task;
  page.arriving = task !== null;
  page.failures = 0;
  showAddress();
  document.title = `${page.execution.slice(0, 8)} – task tags`;
  byId("execution-id").textContent = page.execution;
  showActor();
  byId("opening").hidden = true;
  byId("execution").hidden = false;
  if (same && page.revision !== null) goToTask();
  connect();
}

/** Have the address bar name what is shown; Back leads to what was shown before. */
function showAddress() {
  const { execution, task } = page;
  const address = `#${new URLSearchParams(task === null ? { execution } : { execution, task })}`;
  const before = readFragment().execution?.toLowerCase() ?? null;
  history[before === execution ? "replaceState" : "pushState"](null, "", address);
}

function problemWith(execution, token) {
  if (!UUID.test(execution)) return "The flow execution must be a UUID.";
  if (!token) return "A token is needed.";
  if (!/^[\x21-\x7e]+$/.test(token))
    return "This is not a token: it has characters that are not allowed in a token.";
  return null;
}

function onOpen(event) {
  event.preventDefault();
  const { flow_execution_id, token } = Object.fromEntries(new FormData(byId("open-form")));
  const given = cleaned(token) || page.token;
  const problem = problemWith(flow_execution_id.trim(), given);
  if (problem) {
    tellOpenProblem(problem);
    byId(UUID.test(flow_execution_id.trim()) ? "token-field" : "execution-field").focus();
    return;
  }
  rememberToken(given);
  byId("token-field").value = "";
  const execution = flow_execution_id.trim();
  openExecution(execution, readFragment().execution === execution ? readFragment().task : null);
  byId("execution-title").focus();
}

/** Show the form; what is shown of an execution stays. */
function openForm(problem, execution = page.execution) {
  byId("opening").hidden = false;
  byId("execution-field").value = execution ?? "";
  byId("token-field").placeholder = page.token ? "the token you entered before" : "";
  byId("keep").hidden = page.execution === null;
  tellOpenProblem(problem);
  // A token may expire while somebody types.
  const busy = document.activeElement?.matches("#add-form input");
  if (!busy) byId(execution ? "token-field" : "execution-field").focus();
}

function openAnother() {
  openForm("");
  byId("execution-field").select();
}

function tellOpenProblem(words) {
  byId("open-problem").textContent = words;
  byId("open-problem").hidden = words === "";
}

function closeForm() {
  byId("opening").hidden = true;
  byId("execution-title").focus();
}

function cleaned(token) {
  return token.trim().replace(/^bearer\s+/i, "");
}

function rememberToken(token) {
  page.token = token;
  page.asking = false;
  sessionStorage.setItem(TOKEN_KEY, token);
}

function forgetToken() {
  page.token = null;
  sessionStorage.removeItem(TOKEN_KEY);
  showActor();
}

/** Forget the token, here and in other tabs, and all that was read with it. */
function forget() {
  otherTabs.postMessage({ forgotten: page.token });
  forgetHere();
}

function forgetHere() {
  const { execution } = page;
  forgetToken();
  leaveExecution();
  openForm("", execution);
}

function leaveExecution() {
  leaveConnection();
  forgetState();
  page.execution = page.task = null;
  document.title = "task tags";
  byId("execution").hidden = true;
  showConnection("idle", "Not connected");
}

// Between the tabs of a browser that show the page of this endpoint: nothing of it is stored.
const otherTabs = new BroadcastChannel(`task-tags ${location.pathname}`);

/** Ask other tabs for their token, unless it was forgotten in this one. */
function askOtherTabs() {
  const [navigation] = performance.getEntriesByType("navigation");
  if (page.token || navigation?.type !== "navigate") return;
  page.asking = true;
  otherTabs.postMessage({ wanted: true });
}

function onOtherTab({ data: { wanted, token, forgotten } }) {
  if (wanted && page.token) otherTabs.postMessage({ token: page.token });
  if (token && page.asking && byId("token-field").value === "") {
    rememberToken(token);
    begin();
  }
  if (forgotten && forgotten === page.token) forgetHere();
}

function forgetState() {
  page.revision = null;
  byId("execution").dataset.read = "no";
  for (const name of [...tasks.keys()]) dropTask(name);
  rows.clear();
  ownBatches.clear();
  for (const id of ["stream", "known-tasks", "known-types"]) {
    byId(id).replaceChildren();
    options[id]?.clear();
  }
  for (const id of ["counts", "stream-end", "add-said", "announcer"]) byId(id).textContent = "";
  for (const id of ["no-tasks", "no-batches", "notice", "task-problem"]) byId(id).hidden = true;
  byId("add-form").reset();
  hideProblem(byId("add-problem"));
}

/** Show the actor of the token. It is only decoded here; the endpoint verifies it. */
function showActor() {
  const claims = page.token && actorOf(page.token);
  const place = byId("actor");
  const writes = mayWrite(claims);
  place.replaceChildren();
  if (claims) {
    const until = timeOf(new Date(claims.exp * 1000).toISOString());
    place.append("as ", isolated(claims.sub), writes ? "" : ", to read only", ", until ", until);
  }
  // The style sheet leaves out what changes things. Without a token, who is typing goes on.
  if (page.token) byId("execution").dataset.writes = writes ? "yes" : "no";
  ensureTabStop();
}

/** A token that can't be read may be good for anything. */
function mayWrite(claims) {
  if (!claims) return true;
  const scopes = Array.isArray(claims.scope)
    ? claims.scope
    : String(claims.scope ?? "").split(/\s+/);
  return scopes.includes("task-tags:write");
}

function actorOf(token) {
  try {
    const base64 = token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/");
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    const claims = JSON.parse(new TextDecoder().decode(bytes));
    return typeof claims.sub === "string" && Number.isFinite(claims.exp) ? claims : null;
  } catch {
    return null;
  }
}

// --- Small things --------------------------------------------------------------------------------

function textNode(name, text) {
  const node = document.createElement(name);
  node.textContent = text;
  return node;
}

/** A name that others gave: its direction of writing must not turn the words around it. */
const isolated = (text) => textNode("bdi", text);

/** The same within a text. */
const quoted = (name) => `“\u2068${name}\u2069”`;

const TIME = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });
const DATE_AND_TIME = new Intl.DateTimeFormat(undefined, {
  dateStyle: "medium",
  timeStyle: "short",
});

function wordsOfTime(iso) {
  const moment = new Date(iso);
  const today = moment.toDateString() === new Date().toDateString();
  return (today ? TIME : DATE_AND_TIME).format(moment);
}

/** A page may stay open for days: what was of today gets its date when the day is over. */
function refreshTimes() {
  const today = new Date().toDateString();
  if (page.today === today) return;
  page.today = today;
  for (const node of document.querySelectorAll("time[datetime]"))
    node.textContent = wordsOfTime(node.dateTime);
}

function timeOf(iso, className = "") {
  const node = textNode("time", wordsOfTime(iso));
  node.dateTime = node.title = iso;
  node.className = className;
  return node;
}

function duration(milliseconds) {
  if (milliseconds < 1_000) return `${Math.round(milliseconds)} ms`;
  if (milliseconds < 60_000) return `${(milliseconds / 1_000).toFixed(1)} s`;
  return count(Math.round(milliseconds / 60_000), "minute");
}

function count(number, one, more = `${one}s`) {
  return `${number.toLocaleString()} ${number === 1 ? one : more}`;
}

function sentence(words) {
  return /[.!?]$/.test(words) ? words : `${words}.`;
}

/** What is folded away is built when it is opened: a page of thousands of lines stays light. */
function folded(words, build) {
  const node = document.createElement("details");
  node.append(textNode("summary", words));
  node.addEventListener("toggle", () => node.append(build()), { once: true });
  return node;
}

function buttonFor(words, run) {
  const button = textNode("button", words);
  button.type = "button";
  button.className = "small";
  button.addEventListener("click", run);
  return button;
}

/** Let the eye find what changed; the style sheet leaves it out for those who want no motion. */
function flash(node) {
  node.classList.add("changed");
  node.addEventListener("animationend", () => node.classList.remove("changed"), { once: true });
}

// --- Beginning -----------------------------------------------------------------------------------

byId("open-form").addEventListener("submit", onOpen);
byId("add-form").addEventListener("submit", addTag);
byId("tasks").addEventListener("keydown", onArrow);
byId("tasks").addEventListener(
  "focusin",
  ({ target }) => tabStopOf(target) && setTabStop(tabStopOf(target)),
);
byId("keep").addEventListener("click", closeForm);
byId("change").addEventListener("click", openAnother);
byId("forget").addEventListener("click", forget);
byId("reconnect").addEventListener("click", connect);
addEventListener("hashchange", begin);
otherTabs.addEventListener("message", onOtherTab);
addEventListener("online", reconnectNow);
addEventListener(
  "offline",
  () => byId("connection").dataset.state === "live" && retryLater("This device is offline."),
);
document.addEventListener(
  "visibilitychange",
  () => document.visibilityState === "visible" && onSeen(),
);
setInterval(countDown, 500);
setInterval(refreshTimes, 1_000);
setInterval(checkConnection, PULSE_MS);
begin();
askOtherTabs();
