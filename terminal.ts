/**
 * What only a terminal needs: listings, the progress line and the prompt. Nothing here knows the network.
 */
import { createInterface } from "node:readline";
import {
  formatDuration,
  formatSize,
  isoTime,
  isTerminal,
  printable,
  report,
  setBeforeSaying,
  writeError,
} from "./command.ts";
import { type Entry, RepriseError, UNKNOWN_SIZE } from "./protocol.ts";

/** Redraws of the progress line: at most ten a second. */
const REDRAW_MS = 100;

// ---------------------------------------------------------------------------------------------------- listings

/** A line for each entry, by name; `long` with size and time. */
export function formatListing(entries: Entry[], long: boolean): string {
  const sorted = entries.toSorted((a, b) => (a.path < b.path ? -1 : 1));
  return sorted.map(long ? longLine : shortLine).join("\n");
}

function shortLine(entry: Entry): string {
  return printable(entry.path) + (entry.kind === "folder" ? "/" : "");
}

function longLine(entry: Entry): string {
  const size = entry.kind === "folder" ? "-" : String(entry.size);
  return `${size.padStart(14)}  ${isoTime(entry.mtime).slice(0, 19).replace("T", " ")}  ${shortLine(entry)}`;
}

/** A line for each field, its values in one column. */
export function formatFields(fields: Record<string, unknown>): string {
  const width = Math.max(...Object.keys(fields).map((name) => name.length));
  return Object.entries(fields)
    .map(([name, value]) => `${printable(name).padEnd(width)}  ${printable(formatValue(value))}`)
    .join("\n");
}

const REPLICA_COLUMNS = ["address", "state", "revision", "lag", "problem"];

/** The same of what a server says of itself, with a table of those that have joined it. */
export function formatStatus(info: Record<string, unknown>): string {
  const { replicas, ...fields } = info;
  // Of an older server there is only a number, or nothing.
  if (!Array.isArray(replicas) || replicas.length === 0 || !replicas.every(isRecord)) return formatFields(info);
  return `${formatFields({ ...fields, replicas: replicas.length })}\n\n${formatTable(replicas, REPLICA_COLUMNS)}`;
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null;
}

/** Columns as wide as what is in them, numbers to the right. */
function formatTable(rows: Record<string, unknown>[], columns: string[]): string {
  const cells = [columns, ...rows.map((row) => columns.map((name) => printable(formatValue(row[name] ?? ""))))];
  const widths = columns.map((_, column) => Math.max(...cells.map((line) => Bun.stringWidth(line[column]!))));
  const isNumber = columns.map((name) => rows.every((row) => typeof row[name] === "number"));
  return cells
    .map((line) =>
      line
        .map((cell, column) => pad(cell, widths[column]!, isNumber[column]!))
        .join("  ")
        .trimEnd(),
    )
    .join("\n");
}

function pad(text: string, width: number, toTheRight: boolean): string {
  const blanks = " ".repeat(width - Bun.stringWidth(text));
  return toTheRight ? blanks + text : text + blanks;
}

function formatValue(value: unknown): string {
  if (Array.isArray(value)) return value.length === 0 ? "none" : value.map(formatValue).join(", ");
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

// ---------------------------------------------------------------------------------------------------- progress

/** One line on a terminal, redrawn. `name  45 %  12.3 MB  85.2 MB/s  0:03 left`. */
export class ProgressLine {
  readonly #name: string;
  readonly #startedAt = performance.now();
  #total = 0;
  #offset = 0;
  #bytes = 0;
  #drawnAt = 0;
  #rate = 0;
  readonly #measured = new Rate();

  constructor(name: string) {
    this.#name = printable(name);
    setBeforeSaying(() => this.clear());
  }

  /** `offset` of `total` bytes were there already. */
  begin(offset: number, total: number): void {
    this.#total = total;
    this.#offset = this.#bytes = offset;
    this.#measured.begin(offset);
  }

  update(bytes: number): void {
    this.#bytes = bytes;
    const now = performance.now();
    if (now - this.#drawnAt < REDRAW_MS) return;
    this.#drawnAt = now;
    this.#rate = this.#measured.measure(now, bytes);
    this.#draw(`${formatSize(this.#rate)}/s`, this.#timeLeft());
  }

  /** Replaces the figures by what is going on, where that takes its time. */
  doing(what: string): void {
    this.#draw(what);
  }

  clear(): void {
    if (this.#drawnAt > 0) writeError("\r\x1b[K");
  }

  /** The line goes; with `summary`, what was done takes its place. */
  end(summary: boolean): void {
    this.clear();
    setBeforeSaying(() => {});
    if (!summary) return;
    const seconds = (performance.now() - this.#startedAt) / 1000;
    const bytes = this.#bytes - this.#offset;
    const resumed = this.#offset > 0 ? `, resumed at ${formatSize(this.#offset)}` : "";
    const rate = `${formatSize(bytes / Math.max(seconds, 0.001))}/s`;
    writeError(`${this.#name}  ${formatSize(this.#bytes)} in ${seconds.toFixed(1)} s, ${rate}${resumed}\n`);
  }

  /** Unknown for what comes from a pipe. */
  #share(): string {
    if (this.#total >= UNKNOWN_SIZE) return "";
    return `${this.#total > 0 ? Math.floor((this.#bytes / this.#total) * 100) : 100} %`;
  }

  #timeLeft(): string {
    if (this.#rate < 1 || this.#total >= UNKNOWN_SIZE) return "";
    return `${formatDuration((this.#total - this.#bytes) / this.#rate)} left`;
  }

  #draw(...figures: string[]): void {
    drawLine(this.#name, [this.#share(), formatSize(this.#bytes), ...figures].filter(Boolean));
    this.#drawnAt ||= performance.now();
  }
}

/** One line for a folder on its way. `name  312 of 1,040 files  12.3 MB  85.2 MB/s  0:03 left`. */
export class FolderLine {
  readonly #name: string;
  readonly #tally: FolderTally;
  readonly #rate = new Rate();
  readonly #startedAt = performance.now();
  #drawnAt = 0;

  constructor(name: string, tally: FolderTally) {
    this.#name = printable(name);
    this.#tally = tally;
    setBeforeSaying(() => this.#clear());
  }

  update(): void {
    const now = performance.now();
    if (now - this.#drawnAt < REDRAW_MS) return;
    this.#drawnAt = now;
    const { files, plannedFiles, bytes, plannedBytes, isPlanned } = this.#tally;
    const rate = this.#rate.measure(now, bytes);
    const all = `${plannedFiles.toLocaleString("en")}${isPlanned ? "" : "+"}`;
    // What little has gone in the first second tells nothing.
    const isKnown = isPlanned && rate >= 1 && now - this.#startedAt > 1000;
    const left = isKnown ? `${formatDuration((plannedBytes - bytes) / rate)} left` : "";
    drawLine(this.#name, [
      `${files.toLocaleString("en")} of ${all} files`,
      formatSize(bytes),
      `${formatSize(rate)}/s`,
      left,
    ]);
  }

  end(): void {
    this.#clear();
    setBeforeSaying(() => {});
  }

  #clear(): void {
    if (this.#drawnAt > 0) writeError("\r\x1b[K");
  }
}

export interface FolderTally {
  files: number;
  plannedFiles: number;
  bytes: number;
  plannedBytes: number;
  /** Nothing more will be planned. */
  isPlanned: boolean;
}

/** Bytes a second, smoothed over about two seconds. */
class Rate {
  #rate = 0;
  #at = performance.now();
  #bytes = 0;

  /** `bytes` were there before. */
  begin(bytes: number): void {
    this.#bytes = bytes;
  }

  measure(now: number, bytes: number): number {
    const seconds = (now - this.#at) / 1000;
    const current = (bytes - this.#bytes) / Math.max(seconds, 0.001);
    const weight = this.#rate === 0 ? 1 : Math.min(1, seconds / 2);
    this.#rate += (current - this.#rate) * weight;
    this.#at = now;
    this.#bytes = bytes;
    return this.#rate;
  }
}

/** On a narrow terminal the last figures are left out, rather than a line wrapped that can't be redrawn. */
function drawLine(name: string, figures: string[]): void {
  const rest = ["", ...figures].join("  ");
  const columns = (process.stderr.columns || 80) - 1;
  const room = Math.max(8, columns - Bun.stringWidth(rest));
  writeError(`\r${(shorten(name, room) + rest).slice(0, columns)}\x1b[K`);
}

/** Cut in the middle to at most `width` columns: the end of a name tells more than its middle. */
function shorten(name: string, width: number): string {
  if (Bun.stringWidth(name) <= width) return name;
  const letters = [...name];
  while (Bun.stringWidth(letters.join("")) > width - 1) letters.splice(Math.floor(letters.length / 2), 1);
  return letters.toSpliced(Math.floor(letters.length / 2), 0, "…").join("");
}

// ---------------------------------------------------------------------------------------------------- prompt

export interface Prompt {
  /** Shown before each line. */
  prompt(): string;
  /** Runs one line's words. False ends the prompt. */
  run(words: string[]): Promise<boolean>;
  /** Ways in which the last word can go on. */
  complete(words: string[]): Promise<string[]>;
  /** Ctrl-C: true when there was something to cancel. */
  cancel(): boolean;
}

/**
 * Reads commands until the end of input. A person gets line editing, history, completion, and goes on after an error;
 * a script on stdin ends at its first failure, whose error is thrown.
 */
export async function readCommands(prompt: Prompt): Promise<void> {
  const person = isTerminal(0);
  const completer = (text: string, done: (error: null, result: [string[], string]) => void) => {
    completeLine(prompt, text).then(
      (result) => done(null, result),
      () => done(null, [[], text]),
    );
  };
  const reader = createInterface({
    input: process.stdin,
    ...(person ? { output: process.stderr, terminal: true, completer, historySize: 1000 } : {}),
  });
  let isOpen = true;
  reader.once("close", () => {
    isOpen = false;
  });
  const ask = () => {
    if (!isOpen) return;
    reader.setPrompt(prompt.prompt());
    // What was typed ahead stays as it is, the cursor behind it.
    if (person) reader.prompt(true);
  };
  reader.on("SIGINT", () => {
    if (prompt.cancel()) return;
    // As in a shell: the line is given up, not the program.
    writeError("^C\n");
    reader.write(null, { ctrl: true, name: "e" });
    reader.write(null, { ctrl: true, name: "u" });
    ask();
  });
  ask();
  try {
    for await (const text of reader) {
      if (!(await runLine(prompt, text, person))) break;
      ask();
    }
  } finally {
    reader.close();
  }
  if (person) writeError("\n");
}

async function runLine(prompt: Prompt, text: string, person: boolean): Promise<boolean> {
  try {
    const words = splitWords(text);
    return words.length === 0 || (await prompt.run(words));
  } catch (error) {
    if (!person) throw error;
    report(error);
    return true;
  }
}

async function completeLine(prompt: Prompt, text: string): Promise<[string[], string]> {
  const words = splitWords(text, true);
  const last = words.at(-1) ?? "";
  const typed = text.slice(startOfLastWord(text));
  const found = (await prompt.complete(words)).filter((name) => name.startsWith(last)).map(escapeWord);
  // A word that is complete is followed by a space; a folder may go on.
  const only = found.length === 1 && !found[0]!.endsWith("/") ? [`${found[0]} `] : found;
  return [only, typed];
}

/** Splits a line as a shell does: blanks separate, quotes and backslashes keep. `open` tells an unfinished line. */
export function splitWords(text: string, open = false): string[] {
  const words: string[] = [];
  let word: string | undefined;
  let quoted = "";
  for (let at = 0; at < text.length; at++) {
    const letter = text[at]!;
    if (letter === "\\" && quoted !== "'" && at + 1 < text.length) word = (word ?? "") + text[++at];
    else if (quoted !== "" && letter === quoted) quoted = "";
    else if (quoted === "" && (letter === '"' || letter === "'")) [quoted, word] = [letter, word ?? ""];
    else if (quoted === "" && /\s/.test(letter)) {
      if (word !== undefined) words.push(word);
      word = undefined;
    } else word = (word ?? "") + letter;
  }
  if (quoted !== "" && !open) throw new RepriseError("usage", `a quote is not closed: ${quoted}`);
  if (word !== undefined) words.push(word);
  else if (open) words.push("");
  return words;
}

function startOfLastWord(text: string): number {
  let start = 0;
  let quoted = "";
  for (let at = 0; at < text.length; at++) {
    const letter = text[at]!;
    if (letter === "\\") at++;
    else if (quoted !== "") quoted = letter === quoted ? "" : quoted;
    else if (letter === '"' || letter === "'") quoted = letter;
    else if (/\s/.test(letter)) start = at + 1;
  }
  return start;
}

function escapeWord(word: string): string {
  return word.replace(/[\s\\"']/g, "\\$&");
}
