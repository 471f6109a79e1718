/**
 * The command line of both scripts, made strict, and what they say: options, values, messages, errors.
 *
 * Commands and their options are declared, and explained to the user, with citty. Its parser accepts unknown options,
 * options without a value and any text for a number, so `parse` here takes its place: whatever a command does not
 * declare is refused, with the nearest thing that it does. `runScript` turns every error into a line on stderr and an
 * exit status.
 */
import { fstatSync, writeSync } from "node:fs";
import type { ArgsDef, CommandDef } from "citty";
import type { ConsolaInstance } from "consola";
import { libc } from "./libc.ts";
import { ERRORS, ExitStatus, quote, RepriseError } from "./protocol.ts";

// ---------------------------------------------------------------------------------------------------- command line

/** What a script or one of its commands is: see citty. `examples` are shown by --help. */
export type Command = CommandDef & { examples?: string[] };

/** citty's defineCommand without loading citty, which only `--help` needs. */
export function command(definition: Command): Command {
  return definition;
}

/** A parsed command line: `args._` holds the positionals, options stand under their names. */
export type Args = Record<string, string | boolean | undefined> & { _: string[] };

/**
 * Runs the command that `words` name, or `main` itself without one, and ends the process. Errors are said on stderr; the
 * exit status is that of the error table.
 */
export async function runScript(main: Command, words: string[] = process.argv.slice(2)): Promise<void> {
  try {
    await runWords(main, words);
  } catch (error) {
    process.exitCode = report(error);
  }
  // What was written has been awaited. What may still be open, such as a connection that nobody answers, is not.
  process.exit();
}

/** The same without catching anything, and with `data` for the command: what the prompt does with a line. */
export async function runWords(main: Command, words: string[], data?: unknown): Promise<void> {
  const { command, rest } = select(main, words);
  if (command !== main && command.subCommands) return runWords(command, rest, data);
  if (data !== undefined && command === main) throw usage("name a command");
  if (rest.includes("--help") || rest.includes("-h")) return printUsage(command, command === main ? undefined : main);
  if (rest.includes("--version") && command === main) return print((main.meta as { version: string }).version);
  const definitions = (command.args ?? {}) as ArgsDef;
  if (!command.run) throw usage(`${nameOf(command)} needs one of ${shownCommands(command).join(", ")}`);
  const args = parse(rest, definitions);
  checkPositionals(args._, definitions, command);
  await command.run?.({ args: args as never, rawArgs: rest, cmd: command, data });
}

const said = new WeakSet<Error>();

/** An error of the operating system that nothing more is known about is one of the local disk, and no bug of ours. */
export function asFailure(error: unknown): unknown {
  if (!(error instanceof Error) || error instanceof RepriseError) return error;
  const { code, syscall, message } = error as NodeJS.ErrnoException;
  if (code === undefined || syscall === undefined) return error;
  return new RepriseError("local", `a local file cannot be used: ${printable(message)}`, error);
}

/** Says an error on stderr, once, and gives its exit status. A bug of ours is said with its stack. */
export function report(problem: unknown): number {
  const error = asFailure(problem);
  if (!(error instanceof RepriseError)) {
    say("error", `internal error, please report it: ${error instanceof Error ? error.stack : error}`);
    return ExitStatus.server;
  }
  const { exit } = ERRORS[error.code];
  if (exit !== ExitStatus.done && !said.has(error)) say("error", error.message);
  said.add(error);
  return exit;
}

/** Writes a line to stdout, whole. Throws `pipe_closed` when its reader has gone. */
export async function print(line: string): Promise<void> {
  try {
    await Bun.write(Bun.stdout, `${line}\n`);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "EPIPE") throw new RepriseError("pipe_closed", undefined, error);
    throw new RepriseError("local", `cannot write to standard output: ${(error as Error).message}`, error);
  }
}

/** Options for all commands may stand before the command's name. */
function select(main: Command, words: string[]): { command: Command; rest: string[] } {
  const commands = main.subCommands as Record<string, Command> | undefined;
  if (!commands) return { command: main, rest: words };
  const definitions = (main.args ?? {}) as ArgsDef;
  const at = words.findIndex((word, index) => !isOption(word) && !takesValue(words[index - 1], definitions));
  const name = words[at];
  if (name === undefined) return { command: main, rest: words };
  const command = Object.hasOwn(commands, name) ? commands[name] : undefined;
  const takesWords = Object.values(definitions).some(({ type }) => type === "positional");
  if (!command && takesWords) return { command: main, rest: words };
  if (!command) throw usage(`unknown command ${quote(name)}${didYouMean(name, shownCommands(main))}`);
  return { command, rest: words.toSpliced(at, 1) };
}

/** The names of a script's commands, but for those that only other programs use. */
export function shownCommands(main: Command): string[] {
  const commands = Object.entries((main.subCommands ?? {}) as Record<string, Command>);
  return commands.filter(([, { meta }]) => !(meta as { hidden?: boolean }).hidden).map(([name]) => name);
}

function nameOf(command: Command): string {
  return (command.meta as { name: string }).name;
}

function isOption(word: string): boolean {
  return word.startsWith("-") && word !== "-";
}

function takesValue(word: string | undefined, definitions: ArgsDef): boolean {
  if (word === undefined || !isOption(word) || word.includes("=")) return false;
  const name = optionName(word.replace(/^--?/, ""), definitions);
  return name !== undefined && definitions[name]?.type !== "boolean";
}

/** The name of the option that a word or letter stands for. */
function optionName(word: string, definitions: ArgsDef): string | undefined {
  return Object.keys(definitions).find((name) => {
    const definition = definitions[name]!;
    if (definition.type === "positional") return false;
    const alias = "alias" in definition ? definition.alias : undefined;
    return name === word || alias === word || (Array.isArray(alias) && alias.includes(word));
  });
}

/** Options by their names, defaults included; positionals under `_` and, one by one, under their names. */
function parse(words: string[], definitions: ArgsDef): Args {
  const args = { _: [] } as unknown as Args;
  for (const [name, { default: value }] of Object.entries(definitions)) args[name] = value as string | undefined;
  for (let index = 0; index < words.length; index++) {
    const word = words[index]!;
    if (word === "--") args._.push(...words.splice(index + 1));
    else if (isOption(word)) index += parseOption(args, word, words[index + 1], definitions);
    else args._.push(word);
  }
  const positionals = Object.keys(definitions).filter((name) => definitions[name]?.type === "positional");
  for (const [index, name] of positionals.entries()) args[name] = args._[index] ?? args[name];
  return args;
}

/** Returns how many further words belong to the option: its value, where that is not joined by "=". */
function parseOption(args: Args, word: string, next: string | undefined, definitions: ArgsDef): 0 | 1 {
  const [flag, joined] = word.split(/=(.*)/s) as [string, string | undefined];
  const names = flag.startsWith("--") ? [longOption(flag, definitions)] : shortOptions(flag, definitions);
  const last = names.pop()!;
  for (const name of names) args[name] = true;
  if (definitions[last]!.type === "boolean") {
    if (joined !== undefined) throw usage(`${flag} takes no value`);
    args[last] = flag === `--${last}` || !flag.startsWith("--no-");
    return 0;
  }
  const value = joined ?? next;
  if (value === undefined || (joined === undefined && isOption(value))) throw usage(`${flag} needs a value`);
  args[last] = value;
  return joined === undefined ? 1 : 0;
}

/** `--name`, or `--no-name` for what is on or off. */
function longOption(flag: string, definitions: ArgsDef): string {
  const known = (name: string) => Object.hasOwn(definitions, name) && definitions[name]!.type !== "positional";
  const name = flag.slice(2);
  const negated = name.replace(/^no-/, "");
  if (known(name)) return name;
  if (negated !== name && known(negated) && definitions[negated]!.type === "boolean") return negated;
  const candidates = Object.keys(definitions).filter(known);
  throw usage(`unknown option ${flag}${didYouMean(name, candidates, "--")}`);
}

/** `-qr` is `-q -r`; only the last letter may take a value. */
function shortOptions(flag: string, definitions: ArgsDef): string[] {
  const names = [...flag.slice(1)].map((letter) => {
    const name = optionName(letter, definitions);
    if (name === undefined) throw usage(`unknown option -${letter}`);
    return name;
  });
  const early = names.slice(0, -1).find((name) => definitions[name]?.type !== "boolean");
  if (early !== undefined) throw usage(`--${early} needs a value, and must come last in ${flag}`);
  return names;
}

/** A positional named with a trailing "…" takes any number of words; one that is not required may be left out. */
function checkPositionals(words: string[], definitions: ArgsDef, command: Command): void {
  const positionals = Object.entries(definitions).filter(([, definition]) => definition.type === "positional");
  const name = nameOf(command);
  const missing = positionals.slice(words.length).find(([, definition]) => definition.required !== false);
  if (missing) throw usage(`${name} needs ${missing[0].toUpperCase()}`);
  const open = positionals.some(([positional]) => positional.endsWith("…"));
  if (!open && words.length > positionals.length)
    throw usage(`${name} does not take ${quote(words[positionals.length]!)}`);
}

async function printUsage(command: Command, parent?: Command): Promise<void> {
  const { renderUsage } = await import("citty");
  const text = await renderUsage(command, parent);
  const { examples = [] } = command;
  const lines = examples.length > 0 ? [text, "EXAMPLES", "", ...examples.map((line) => `  ${line}`), ""] : [text];
  const whole = lines.join("\n");
  await print(isTerminal(1) && !process.env.NO_COLOR ? whole : Bun.stripANSI(whole));
}

export function usage(text: string): RepriseError {
  return new RepriseError("usage", `${text}; --help lists what there is`);
}

function didYouMean(word: string, candidates: string[], prefix = ""): string {
  const near = candidates.map((name) => ({ name, distance: editDistance(word, name) }));
  const best = near.sort((a, b) => a.distance - b.distance)[0];
  return best && best.distance <= Math.max(1, word.length / 3) ? `, did you mean ${prefix}${best.name}?` : "";
}

/** Insertions, deletions, replacements and swaps of neighbours that lead from `a` to `b`. */
function editDistance(a: string, b: string): number {
  const rows: number[][] = [Array.from({ length: b.length + 1 }, (_, index) => index)];
  for (let i = 1; i <= a.length; i++) {
    const row = [i];
    for (let j = 1; j <= b.length; j++) {
      const replaced = rows[i - 1]![j - 1]! + (a[i - 1] === b[j - 1] ? 0 : 1);
      const swapped = i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1];
      const around = swapped ? rows[i - 2]![j - 2]! + 1 : replaced;
      row.push(Math.min(rows[i - 1]![j]! + 1, row[j - 1]! + 1, replaced, around));
    }
    rows.push(row);
  }
  return rows[a.length]![b.length]!;
}

/** Asked in this order for the time it takes: node:tty would cost a third of a small download to load. */
export function isTerminal(fd: number): boolean {
  if (!isCharacterDevice(fd)) return false;
  return libc()?.isTerminal(fd) ?? (require("node:tty") as typeof import("node:tty")).isatty(fd);
}

function isCharacterDevice(fd: number): boolean {
  try {
    return fstatSync(fd).isCharacterDevice();
  } catch {
    // Closed.
    return false;
  }
}

// ---------------------------------------------------------------------------------------------------- values

/** A whole number in a range. Throws `usage`. */
export function numberOption(args: Args, name: string, range: { min: number; max: number }): number {
  const text = String(args[name]);
  const value = Number(text);
  if (/^\d+$/.test(text) && value >= range.min && value <= range.max) return value;
  throw usage(`--${name} takes a whole number from ${range.min} to ${range.max}, not ${quote(text)}`);
}

/** Seconds, with a fraction if wanted, as milliseconds. Throws `usage`. */
export function secondsOption(args: Args, name: string): number {
  const text = String(args[name]);
  const value = Number(text);
  if (/^\d+(\.\d+)?$/.test(text) && value > 0 && value <= 86_400) return value * 1000;
  throw usage(`--${name} takes seconds, up to 86400, not ${quote(text)}`);
}

const SIZE_UNITS = { "": 1, K: 1024, M: 1024 ** 2, G: 1024 ** 3, T: 1024 ** 4 } as const;

/**
 * Bytes as in `500K`, `10M`, `1.5G` (powers of 1024), `least` or more; undefined where the option is not given. Throws
 * `usage`.
 */
export function sizeOption(args: Args, name: string, least = 1): number | undefined {
  if (args[name] === undefined) return undefined;
  const text = String(args[name]);
  const match = /^(\d+(?:\.\d+)?)([KMGT]?)B?$/i.exec(text);
  const value = match
    ? Math.floor(Number(match[1]) * SIZE_UNITS[match[2]!.toUpperCase() as keyof typeof SIZE_UNITS])
    : -1;
  if (value >= least && Number.isSafeInteger(value)) return value;
  throw usage(`--${name} takes a size such as 500K or 10M, not ${quote(text)}`);
}

/** `12.3 MB`, in powers of 1000. */
export function formatSize(bytes: number): string {
  if (bytes < 1000) return `${Math.round(bytes)} B`;
  const power = Math.min(5, Math.floor(Math.log10(bytes) / 3));
  return `${(bytes / 1000 ** power).toFixed(1)} ${"kMGTP"[power - 1]}B`;
}

/** `0:07`, `12:34`, `1:02:03`. */
export function formatDuration(seconds: number): string {
  const whole = Math.max(0, Math.round(seconds));
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (value: number) => String(value).padStart(2, "0");
  return h > 0 ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}`;
}

/** Microseconds since 1970 as ISO 8601 in UTC, with the microseconds that a Date drops. */
export function isoTime(mtime: number): string {
  const micros = ((mtime % 1000) + 1000) % 1000;
  return new Date(Math.floor(mtime / 1000)).toISOString().replace("Z", `${String(micros).padStart(3, "0")}Z`);
}

/** A name as it may stand on a terminal: control and bidirectional characters escaped, nothing cut, no quotes. */
export function printable(name: string): string {
  return quote(name, Number.POSITIVE_INFINITY).slice(1, -1).replaceAll('\\"', '"').replaceAll("\\\\", "\\");
}

// ---------------------------------------------------------------------------------------------------- messages

let consola: ConsolaInstance | undefined;
let quiet = false;
let beforeSaying = () => {};

/** With `-q` only errors are said. */
export function setQuiet(value: boolean): void {
  quiet = value;
}

let progress = true;

/** Whether a progress line is wanted, where one can be drawn. */
export function setProgress(value: boolean): void {
  progress = value;
}

/** What clears away a line that is being redrawn, before another is said. */
export function setBeforeSaying(clear: () => void): void {
  beforeSaying = clear;
}

/** One line on stderr, through consola, which is loaded by the first: it costs more than a small download. */
export function say(level: "error" | "warn" | "info", text: string): void {
  if (quiet && level !== "error") return;
  consola ??= createLog();
  beforeSaying();
  consola[level](text);
}

function createLog(): ConsolaInstance {
  const { createConsola } = require("consola/core") as typeof import("consola/core");
  const colours: Record<string, string> = { error: "\x1b[31m", warn: "\x1b[33m", info: "" };
  return createConsola({
    level: 3,
    throttle: 0,
    reporters: [
      {
        log({ type, args }) {
          const label = type === "info" ? "" : `${type}: `;
          const colour = useColour() ? (colours[type] ?? "") : "";
          writeError(`${colour}${label}${colour && "\x1b[0m"}${args.join(" ")}\n`);
        },
      },
    ],
  });
}

/** To stderr, as far as it takes it: an error that can't be said must not become another one. */
export function writeError(text: string): void {
  try {
    writeSync(2, text);
  } catch {
    // Closed, or full.
  }
}

function useColour(): boolean {
  return isTerminal(2) && !process.env.NO_COLOR && process.env.TERM !== "dumb";
}

/** Whether progress can be shown: stderr is a terminal on which a line can be redrawn, and wanted. */
export function showsProgress(): boolean {
  return !quiet && progress && isTerminal(2) && process.env.TERM !== "dumb";
}
