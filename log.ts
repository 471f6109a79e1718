/**
 * The server's log: a line on stderr for each request and each refusal, as JSON or for reading.
 *
 * Lines of one turn are written together. Whoever is refused again and again does not fill the disk: beyond a number of
 * lines a minute, refusals of a kind are only counted, and the count is logged. No line ever has a token.
 */
import { writeSync } from "node:fs";
import { say } from "./command.ts";
import { quote, toJson } from "./protocol.ts";

/** Characters of the log written at once; PIPE_BUF is 4096 bytes. */
const MAX_LOGGED_TOGETHER = 3_500;
/** Lines a minute of refusals with one status; the rest is counted. */
const MAX_REFUSALS = 30;
const REFUSALS_MS = 60_000;

export type LogFormat = "pretty" | "json";
/** Where a line comes from, and how it is to look. */
export interface LogSettings {
  log: LogFormat;
  /** 0 is the supervisor. */
  worker: number;
}

export interface LogFields {
  event: string;
  status: string;
  peer?: string | undefined;
  /** The name of a token. */
  token?: string | undefined;
  path?: string | undefined;
  /** The new path, of a move; or the server that a client was sent to. */
  to?: string | undefined;
  offset?: number | undefined;
  bytes?: number | undefined;
  ms?: number | undefined;
  /** How many of them. */
  count?: number | undefined;
  /** The reason, where the peer is not told it. */
  why?: string | undefined;
}

/** One line on stderr. These fields are a contract: `time event peer worker path offset bytes ms status`. */
export function log(settings: LogSettings, fields: LogFields): void {
  const { event, peer, token, path, to, offset, bytes, ms, status, count, why } = fields;
  const { worker } = settings;
  if (settings.log === "json") {
    writeLine(toJson({ time: timeNow(), event, peer, worker, token, path, to, offset, bytes, ms, status, count, why }));
    return;
  }
  const what = [event, ...[path, to].filter((name) => name !== undefined).map((name) => quote(name))].join(" ");
  const who = token === undefined ? (peer ?? "-") : `${peer} ${token}`;
  const figures = bytes === undefined ? "" : ` from ${offset ?? 0}: ${bytes} bytes in ${ms} ms`;
  const often = count === undefined ? "" : event === "reload" ? `: ${count}` : `, ${count} further times`;
  const because = why === undefined ? "" : `: ${why}`;
  const time = new Date().toLocaleTimeString("en-GB");
  say("info", `${time} [${worker}] ${who} ${what}${figures}, ${status}${because}${often}`);
}

const refusals = new Map<string, number>();
let settingsOfRefusals: LogSettings | undefined;

/** A connection was turned away or ended over what its peer did, or a request that it may not make was refused. */
export function logRefusal(settings: LogSettings, fields: Omit<LogFields, "event"> & { event?: string }): void {
  const { status } = fields;
  settingsOfRefusals = settings;
  if (refusals.size === 0) setTimeout(logCounts, REFUSALS_MS).unref();
  const count = (refusals.get(status) ?? 0) + 1;
  refusals.set(status, count);
  if (count <= MAX_REFUSALS) log(settings, { event: "close", ...fields });
}

function logCounts(): void {
  for (const [status, count] of refusals)
    if (count > MAX_REFUSALS) log(settingsOfRefusals!, { event: "refusals", status, count: count - MAX_REFUSALS });
  refusals.clear();
}

let lastTime = { at: 0, text: "" };

/** The time as text, made once for all lines of a millisecond. */
function timeNow(): string {
  const at = Date.now();
  if (at !== lastTime.at) lastTime = { at, text: new Date(at).toISOString() };
  return lastTime.text;
}

let lines = "";

/** What comes in one turn is written together, up to what a pipe takes whole, so that the lines of workers do not mix. */
function writeLine(line: string): void {
  if (lines.length + line.length > MAX_LOGGED_TOGETHER) writeLines();
  if (lines === "") setImmediate(writeLines);
  lines += `${line}\n`;
}

/** A log that is full loses lines, not clients. */
function writeLines(): void {
  if (lines === "") return;
  try {
    writeSync(2, lines);
  } catch {
    // Nobody is left to be told that the log cannot be written.
  }
  lines = "";
}
process.on("exit", () => {
  logCounts();
  writeLines();
});

export function logBug(settings: LogSettings, error: unknown): void {
  const stack = error instanceof Error ? (error.stack ?? error.message) : String(error);
  if (settings.log === "json") {
    const { worker } = settings;
    writeLine(toJson({ time: timeNow(), event: "bug", worker, status: "failed", stack }));
  } else say("error", `[${settings.worker}] internal error, please report it: ${stack}`);
}
