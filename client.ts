#!/usr/bin/env bun
/**
 * The reprise client: gets files from a reprise server, whole, through any interruption.
 *
 * ```sh
 * bun client.ts get photo.png                  # into client_root/
 * bun client.ts get photo.png -o /tmp/p.png    # or anywhere
 * bun client.ts cat notes.txt | wc             # or into a pipe
 * bun client.ts ls --server 192.0.2.7:2121
 * bun client.ts                                # resumes what was interrupted, then prompts
 * ```
 *
 * As a library: `Remote`, with a method for each action; importing this file starts nothing.
 */
import { closeSync, open, type Stats, statSync } from "node:fs";
import { basename, join, posix } from "node:path";
import {
  type Args,
  type Command,
  command,
  formatSize,
  isoTime,
  isTerminal,
  numberOption,
  print,
  printable,
  report,
  runScript,
  runWords,
  say,
  secondsOption,
  setQuiet,
  showsProgress,
  sizeOption,
  usage,
} from "./command.ts";
import { version } from "./package.json";
import { DEFAULT_PORT, type Entry, ERRORS, type Meta, quote, RepriseError, splitPath, toJson } from "./protocol.ts";
import { parseServers, Remote } from "./remote.ts";
import { asLocal, LOG_SUFFIX, PART_SUFFIX, PartFile, readLog, StreamTarget, type Target } from "./resume.ts";

export { parseServers, Remote };

/** How long Tab waits for the server. */
const COMPLETION_MS = 3_000;
/** How long an interrupted client may take to save its log before it is ended all the same. */
const INTERRUPT_MS = 1_000;

// ---------------------------------------------------------------------------------------------------- commands

const common = {
  server: { type: "string", valueHint: "host:port", description: "Server, or several with commas (REPRISE_SERVER)" },
  timeout: {
    type: "string",
    valueHint: "seconds",
    default: "30",
    description: "Give up a wait after this long without a byte",
  },
  retries: { type: "string", valueHint: "number", default: "10", description: "Further attempts after a failure" },
  "limit-rate": { type: "string", valueHint: "rate", description: "Bytes a second at the most, as in 500K or 10M" },
  quiet: { type: "boolean", alias: "q", description: "Say nothing but errors" },
  json: { type: "boolean", description: "One JSON object a line on stdout" },
} as const;

const destination = {
  directory: {
    type: "string",
    alias: "d",
    valueHint: "dir",
    default: "client_root",
    description: "Folder for what arrives",
  },
} as const;

/** What a command works with: at the prompt one for all lines, else one for the command. */
interface Context {
  remote: Remote;
  server: string;
  /** The server was named by the user, rather than left to the default or a resume log. */
  isNamed: boolean;
  /** Another server, with the same options and the same way to interrupt. */
  connectTo: (server: string) => Remote;
  /** At the prompt: the folder on the server that names are relative to. */
  folder: string | undefined;
  json: boolean;
}

const get = command({
  meta: { name: "get", description: "Get files, going on where an earlier attempt was cut" },
  args: {
    "path…": { type: "positional", description: "Files on the server" },
    ...common,
    ...destination,
    output: { type: "string", alias: "o", valueHint: "file", description: "Name for the file; - is standard output" },
  },
  run: withContext(async (context, args) => {
    const paths = remotePaths(context, args);
    const output = args.output as string | undefined;
    if (output === "") throw usage("-o needs a name");
    if (output !== undefined && output !== "-" && paths.length > 1)
      throw usage("-o takes one file, use -d for several");
    const targets = paths.map((path) => ({ path, file: output ?? join(String(args.directory), basename(path)) }));
    checkTwins(output === "-" ? [] : targets);
    await forEach(targets, ({ path, file }) => getOne(context, path, file));
  }),
});

const cat = command({
  meta: { name: "cat", description: "Write files to standard output, one after the other" },
  args: { "path…": { type: "positional", description: "Files on the server" }, ...common },
  run: withContext(async (context, args) => {
    await forEach(remotePaths(context, args), (path) => getOne(context, path, "-"));
  }),
});

const ls = command({
  meta: { name: "ls", description: "List a folder" },
  args: {
    path: { type: "positional", required: false, description: "Folder on the server" },
    ...common,
    long: { type: "boolean", alias: "l", description: "With size and time" },
    recursive: { type: "boolean", alias: "r", description: "With the folders below" },
  },
  run: withContext(async (context, args) => {
    const path = resolveRemote(context.folder, String(args.path ?? ""));
    const recursive = args.recursive === true;
    if (context.json) {
      for await (const entry of listing(context.remote, path, recursive)) await print(toJson(jsonEntry(entry)));
      return;
    }
    const { formatListing } = await import("./terminal.ts");
    const entries = await Array.fromAsync(listing(context.remote, path, recursive));
    if (entries.length > 0) await print(formatListing(entries, args.long === true));
  }),
});

const stat = command({
  meta: { name: "stat", description: "Show what is known of a file or folder" },
  args: { path: { type: "positional", description: "File or folder on the server" }, ...common },
  run: withContext(async (context, args) => {
    const path = resolveRemote(context.folder, String(args.path));
    const meta = await context.remote.stat(path);
    const shown = { ...jsonEntry({ ...meta, path }), etag: meta.etag };
    if (context.json) return print(toJson(shown));
    await printFields(shown);
  }),
});

const resume = command({
  meta: { name: "resume", description: "Go on with every interrupted transfer" },
  args: { ...common, ...destination },
  run: withContext(async (context, args) => {
    const found = await resumeAll(context, String(args.directory));
    if (found === 0) say("info", "nothing to resume");
  }),
});

const status = command({
  meta: { name: "status", description: "Show the server's version, workers and replicas" },
  args: common,
  run: withContext(async (context) => {
    const info = await context.remote.status();
    if (context.json) return print(toJson(info));
    await printFields(info);
  }),
});

const commands = { get, cat, ls, stat, resume, status };

export const main: Command = command({
  meta: { name: "client.ts", version, description: "reprise client: files, whole, through any interruption" },
  args: { ...common, ...destination },
  subCommands: commands,
  run: withContext(async (context, args) => {
    const unresumed = await resumeFirst(context, args);
    await readPrompt(context, args);
    // A script has done its own work; what could not be resumed is still a failure.
    if (unresumed && !isTerminal(0)) throw unresumed;
  }),
});

// ---------------------------------------------------------------------------------------------------- their parts

/** Turns a function of a context into a command's `run`; the prompt hands its own context in as `data`. */
function withContext(run: (context: Context, args: Args) => Promise<unknown>) {
  return async ({ args, data }: { args: unknown; data?: unknown }): Promise<void> => {
    const options = args as Args;
    if (data) return void (await run({ ...(data as Context), json: options.json === true }, options));
    setQuiet(options.quiet === true);
    const context = contextFrom(options, watchSignals());
    try {
      await run(context, options);
    } finally {
      context.remote.close();
    }
  };
}

function contextFrom(args: Args, signal: AbortSignal): Context {
  const options = {
    timeoutMs: secondsOption(args, "timeout"),
    retries: numberOption(args, "retries", { min: 0, max: 1_000_000 }),
    limitRate: sizeOption(args, "limit-rate"),
    signal,
    note: (text: string) => say("warn", text),
  };
  const connectTo = (name: string) => new Remote({ ...options, servers: parseServers(name) });
  const server = serverOf(args);
  const isNamed = args.server !== undefined;
  return { remote: connectTo(server), server, isNamed, connectTo, folder: undefined, json: args.json === true };
}

function serverOf(args: Args): string {
  return String(args.server ?? (process.env.REPRISE_SERVER || `127.0.0.1:${DEFAULT_PORT}`));
}

/** Aborts on SIGINT and SIGTERM, and sees to it that the process then ends even if something hangs. */
const interruption = new AbortController();
function watchSignals(): AbortSignal {
  for (const [name, code] of [
    ["SIGINT", "interrupted"],
    ["SIGTERM", "terminated"],
  ] as const) {
    process.on(name, () => {
      const end = () => process.exit(ERRORS[code].exit);
      if (interruption.signal.aborted) end();
      interruption.abort(new RepriseError(code));
      setTimeout(end, INTERRUPT_MS).unref();
    });
  }
  return interruption.signal;
}

/** Every item is tried and each failure has its line; the first one is thrown in the end, and gives the exit status. */
async function forEach<T>(items: T[], work: (item: T) => Promise<void>): Promise<void> {
  let first: unknown;
  for (const item of items) {
    try {
      await work(item);
    } catch (error) {
      const fatal = !(error instanceof RepriseError) || error.code === "pipe_closed" || interruption.signal.aborted;
      if (fatal) throw error;
      report(error);
      first ??= error;
    }
  }
  if (first) throw first;
}

async function getOne(context: Context, path: string, file: string): Promise<void> {
  // What the server would refuse makes no file here.
  if (splitPath(path).length === 0) throw new RepriseError("not_a_file", "not a file: the served folder itself");
  if (file === "-") return getStream(context, path, 1, "standard output");
  const found = lookAt(file);
  if (found && !found.isFile() && !found.isDirectory()) return getDevice(context, path, file);
  const started = performance.now();
  const done = (meta: Meta, offset: number) => printGot(context, { path, file, ...meta, offset, started });
  const complete = found?.isFile() ? await ifComplete(context.remote, path, file) : undefined;
  if (complete) return done(complete, complete.size);
  const part = PartFile.open(file, path, context.server, (text) => say("warn", text));
  try {
    const { meta, offset } = await transfer(context, path, part, () => part.finish());
    await done(meta, offset);
  } catch (error) {
    if (part.bytes === 0) part.discard();
    throw isInterruption(error)
      ? new RepriseError(error.code, `${error.code}; the same command goes on from here`)
      : error;
  } finally {
    part.close();
  }
}

function isInterruption(error: unknown): error is RepriseError {
  return error instanceof RepriseError && (error.code === "interrupted" || error.code === "terminated");
}

/** `path file size mtime etag offset ms`: contract for `get --json`. */
async function printGot(context: Context, got: Meta & { path: string; file: string; offset: number; started: number }) {
  if (!context.json) return;
  const { path, file, size, mtime, etag, offset } = got;
  const ms = Math.round(performance.now() - got.started);
  await print(toJson({ path, file, size, mtime: isoTime(mtime), etag, offset, ms }));
}

/** Undefined for what is not there, or cannot be: making it says why. */
function lookAt(file: string): Stats | undefined {
  try {
    return statSync(file);
  } catch {
    return undefined;
  }
}

async function getDevice(context: Context, path: string, file: string): Promise<void> {
  const fd = await openForWriting(file);
  try {
    await getStream(context, path, fd, file);
  } finally {
    closeSync(fd);
  }
}

/** Beside the event loop: a pipe is opened when somebody opens its other end, which may be never. */
function openForWriting(file: string): Promise<number> {
  return new Promise((resolve, reject) => {
    open(file, "w", (error, fd) => (error ? reject(asLocal(error, file)) : resolve(fd)));
    interruption.signal.addEventListener("abort", () => reject(interruption.signal.reason), { once: true });
  });
}

async function getStream(context: Context, path: string, fd: number, name: string): Promise<void> {
  const target = new StreamTarget(fd, name);
  try {
    await transfer(context, path, target, async () => {});
  } finally {
    target.close();
  }
}

/** A download with its progress line. */
async function transfer(
  context: Context,
  path: string,
  target: Target,
  finish: () => Promise<void>,
): Promise<{ meta: Meta; offset: number }> {
  const line = showsProgress() ? new (await import("./terminal.ts")).ProgressLine(basename(path)) : undefined;
  let done = false;
  let offset = Number.POSITIVE_INFINITY;
  try {
    const meta = await context.remote.download(path, target, {
      begin(meta, from) {
        // Where an attempt goes on is no news, unless it is further back: then all was started again.
        if (from >= offset) return;
        offset = from;
        line?.begin(from, meta.size);
      },
      progress: (bytes) => line?.update(bytes),
    });
    line?.doing("writing to disk");
    await finish();
    done = true;
    return { meta, offset };
  } finally {
    line?.end(done);
  }
}

/** What the server has, if the local file is that, by size and time: then nothing is sent. */
async function ifComplete(remote: Remote, path: string, file: string): Promise<Meta | undefined> {
  const local = statSync(file, { bigint: true });
  const meta = await remote.stat(path);
  // A time set through a double may be off by one microsecond.
  const sameTime = Math.abs(Number(local.mtimeNs / 1000n) - meta.mtime) <= 1;
  if (meta.kind !== "file" || Number(local.size) !== meta.size || !sameTime) return undefined;
  // What an earlier download left behind is of no more use.
  if ([PART_SUFFIX, LOG_SUFFIX].some((suffix) => lookAt(file + suffix))) PartFile.clear(file);
  say("info", `${printable(file)} is complete already`);
  return meta;
}

/** What comes before the prompt. A failure is said and returned: an old leftover must not keep anybody from new work. */
async function resumeFirst(context: Context, args: Args): Promise<unknown> {
  try {
    await resumeAll(context, String(args.directory));
    return undefined;
  } catch (error) {
    if (interruption.signal.aborted || !(error instanceof RepriseError)) throw error;
    report(error);
    return error;
  }
}

/** Goes on with every download that has a log under `directory`; returns how many there were. */
async function resumeAll(context: Context, directory: string): Promise<number> {
  const logs = await findLogs(directory);
  await forEach(logs, async (name) => {
    const log = readLog(name);
    const file = name.slice(0, -LOG_SUFFIX.length);
    if (log === undefined) return;
    if (typeof log === "string") throw new RepriseError("local", `${log}; get ${quote(file)} again`);
    const server = context.isNamed ? context.server : log.server;
    say(
      "info",
      `resuming ${printable(file)} from ${printable(server)} at ${formatSize(log.bytes)} of ${formatSize(log.size)}`,
    );
    const remote = context.connectTo(server);
    try {
      await getOne({ ...context, remote, server }, log.path, file);
    } finally {
      remote.close();
    }
  });
  return logs.length;
}

async function findLogs(directory: string): Promise<string[]> {
  const isDefault = directory === destination.directory.default;
  if (isDefault && !lookAt(directory)) return [];
  try {
    const names = await Array.fromAsync(new Bun.Glob(`**/*${LOG_SUFFIX}`).scan({ cwd: directory, dot: true }));
    return names.map((name) => join(directory, name)).sort();
  } catch (error) {
    throw new RepriseError("local", `cannot look into ${quote(directory)} for interrupted transfers`, error);
  }
}

/** A folder's entries; a file lists itself. */
async function* listing(remote: Remote, path: string, recursive: boolean): AsyncGenerator<Entry> {
  try {
    yield* remote.list(path, recursive);
  } catch (error) {
    if (!(error instanceof RepriseError) || error.code !== "not_a_folder") throw error;
    yield { ...(await remote.stat(path)), path: basename(path) };
  }
}

async function printFields(fields: Record<string, unknown>): Promise<void> {
  const { formatFields } = await import("./terminal.ts");
  await print(formatFields(fields));
}

/** `path type size mtime`: contract for `--json`. */
function jsonEntry({ path, kind, size, mtime }: Entry): Record<string, unknown> {
  return { path, type: kind, size, mtime: isoTime(mtime) };
}

/** The paths that a command names, relative to the prompt's folder. */
function remotePaths(context: Context, args: Args): string[] {
  return args._.map((path) => resolveRemote(context.folder, path));
}

/** At the prompt `..`, `.` and a leading slash mean what they mean in a shell; elsewhere the server sees every word. */
function resolveRemote(folder: string | undefined, path: string): string {
  if (folder !== undefined) return posix.resolve("/", folder, path).slice(1);
  return path === "/" ? "" : path.length > 1 && path.endsWith("/") ? path.slice(0, -1) : path;
}

function checkTwins(targets: { path: string; file: string }[]): void {
  const seen = new Map<string, string>();
  for (const { path, file } of targets) {
    const twin = seen.get(file);
    if (twin !== undefined) throw usage(`${quote(twin)} and ${quote(path)} would both be written to ${quote(file)}`);
    seen.set(file, path);
  }
}

// ---------------------------------------------------------------------------------------------------- prompt

const PROMPT_HELP = `get PATH…   into the local folder (-o FILE, -d DIR)
ls [PATH]   list a folder (-l, -r)
cd [PATH]   go to a folder on the server
stat PATH   what is known of a file
resume      go on with what was interrupted
help, quit`;

async function readPrompt(outer: Context, args: Args): Promise<void> {
  const directory = String(args.directory);
  if (isTerminal(0)) say("info", `server ${outer.server}; files go to ${directory}/; help lists the commands`);
  outer.remote.close();
  let line = new AbortController();
  let busy = false;
  // Each interruption ends the connection with it, so that the next line has one of its own.
  const renewed = () => contextFrom(args, AbortSignal.any([line.signal, interruption.signal]));
  const context = { ...renewed(), folder: "" };
  const { readCommands } = await import("./terminal.ts");
  await readCommands({
    prompt: () => `reprise:/${printable(context.folder)}> `,
    // While a line runs, its answers are on the way; names can wait.
    complete: async (words) => (busy ? [] : complete(context, words)),
    cancel() {
      if (busy) line.abort(new RepriseError("interrupted"));
      return busy;
    },
    async run(words) {
      if (line.signal.aborted) {
        line = new AbortController();
        Object.assign(context, renewed(), { folder: context.folder });
      }
      busy = true;
      try {
        return await runLine(context, words, directory);
      } finally {
        busy = false;
      }
    },
  });
  context.remote.close();
}

/** The commands as they are at the prompt, which has its server and its options already. */
const promptMain = command({
  ...main,
  subCommands: Object.fromEntries(
    Object.entries(commands).map(([name, definition]) => [name, withoutCommon(definition)]),
  ),
});

function withoutCommon(definition: Command): Command {
  const own = Object.entries(definition.args ?? {}).filter(([name]) => name === "json" || !Object.hasOwn(common, name));
  return { ...definition, args: Object.fromEntries(own) };
}

async function runLine(context: Context, words: string[], directory: string): Promise<boolean> {
  const [name, ...rest] = words;
  if (name === "quit" || name === "exit") {
    await context.remote.quit();
    return false;
  }
  if (name === "help") await print(PROMPT_HELP);
  else if (name === "cd") await changeFolder(context, rest);
  else if (name === "get" || name === "resume") await runWords(promptMain, [name, "-d", directory, ...rest], context);
  else await runWords(promptMain, words, context);
  return true;
}

async function changeFolder(context: Context, words: string[]): Promise<void> {
  if (words.length > 1) throw usage("cd takes one folder");
  const folder = words[0] === undefined ? "" : resolveRemote(context.folder, words[0]);
  const { kind } = await context.remote.stat(folder);
  if (kind !== "folder") throw new RepriseError("not_a_folder", `not a folder: ${quote(folder)}`);
  context.folder = folder;
}

/** Commands for the first word, names on the server for the others. */
async function complete(context: Context, words: string[]): Promise<string[]> {
  if (words.length <= 1) return ["cat", "cd", "get", "help", "ls", "quit", "resume", "stat", "status"];
  const typed = words.at(-1)!;
  const parent = typed.slice(0, typed.lastIndexOf("/") + 1);
  // A key press is not worth ten attempts.
  const remote = new Remote({ servers: parseServers(context.server), retries: 0, timeoutMs: COMPLETION_MS });
  try {
    const entries = await Array.fromAsync(remote.list(resolveRemote(context.folder, parent)));
    const names = entries.map(({ path, kind }) => parent + path + (kind === "folder" ? "/" : ""));
    // What a terminal would obey can be typed by nobody, and must not be drawn.
    return names.filter((name) => printable(name) === name).sort();
  } finally {
    remote.close();
  }
}

if (import.meta.main) await runScript(main);
